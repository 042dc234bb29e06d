"""The distribution q of published draft heads: what they compute is what the formulas of their papers say.

The output follows the target's distribution with any q, so no law of texts sees that a head is computed otherwise than
it was trained. These tests do: by `support.eagle`, which computes a head from its tensors, token by token.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import mcsd
from mcsd.drafters import HeadDrafter
from mcsd.loading.published_heads import load_head
from mcsd.models import BoundHead, DecoderModel, TokenLayout
from mcsd.models.prefill import prefill
from mcsd.rng import DRAW, PhiloxStream
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES
from support import eagle
from support.chisquare import SEED
from support.eagle import VARIANTS, Published

PROMPTS = [[5, 9, 2, 5, 9, 31, 8], [7], [1, 2, 3, 4]]


def bound(published: Published, folder: Path, target: DecoderModel) -> tuple[BoundHead, dict[str, Tensor]]:
    tensors = published.write(folder, SEED)
    return BoundHead(load_head(folder, target), target, "head"), tensors


@pytest.mark.parametrize("published", VARIANTS, ids=str)
def test_a_chain_of_three_steps_computes_the_formulas(published: Published, tmp_path: Path) -> None:
    """A text in two pieces, with the target's hidden states, then two tokens with the head's own."""
    head, tensors = bound(published, tmp_path, eagle.target())
    text = [5, 9, 2, 40, 9, 31, 8, 3]
    read = len(text) - 3
    before = torch.cat([torch.zeros(1, eagle.states(published, text).shape[1]), eagle.states(published, text[:read])])
    cache = head.new_cache(1, 16)
    cache.add()
    found, start = [], 0
    for stop in (3, read + 1):
        piece, count = torch.tensor([text[start:stop]]), stop - start
        output = head.forward(piece, before[None, start:stop], TokenLayout.chain(count), cache)
        cache.commit(torch.arange(count)[None], torch.tensor([count]))
        found.append(output.logits[0])
        start = stop
    for step, token in enumerate(text[-2:]):
        assert output.hidden is not None
        layout = TokenLayout(torch.arange(step + 1), torch.ones(1, step + 1, dtype=torch.bool))
        output = head.forward(torch.tensor([[token]]), output.hidden[:, -1:], layout, cache, own=True)
        found.append(output.logits[0])
    expected = eagle.logits(published, tensors, text, read)
    torch.testing.assert_close(torch.cat(found)[1:].double(), expected, atol=1e-5, rtol=1e-5)
    assert head.vocabulary.tolist() == eagle.tokens_of(published)


@pytest.mark.parametrize("published", [VARIANTS[0], VARIANTS[-3], VARIANTS[-2]], ids=str)
def test_q_in_a_tree_follows_the_formulas(published: Published, tmp_path: Path) -> None:
    """Sequences of unequal length, three steps with commits: q at each node is that after the tokens on its path.

    Of what was accepted, the head reads the target's hidden states; below the root its own.
    """
    target = eagle.target()
    head, tensors = bound(published, tmp_path, target)
    shape, layers = mcsd.TreeShape.parse("2x2"), head.config.hidden_layers
    drafter, cache = HeadDrafter(head, 3, 64), target.new_cache(3, 64)
    texts = [list(prompt) for prompt in PROMPTS]
    for prompt in PROMPTS:
        index = cache.add()
        drafter.add(prompt, prefill(target, cache, index, prompt[:-1], layers) if prompt[:-1] else None)
    sampling = BatchSamplingParams.of([mcsd.SamplingParams(temperature=0.8)] * 3, torch.device("cpu"))
    columns = eagle.tokens_of(published)
    for step in range(3):
        random = PhiloxStream(torch.arange(3), torch.full((3,), step), DRAW)
        tree = drafter.draft(texts, shape, SCHEMES["mcss-wor"](), sampling, random)
        assert tree.q is not None
        for row, text in enumerate(texts):
            # Before the first token there is no hidden state: papers do not say what a head reads there.
            for node in (-1, 0, 1) if len(text) > 1 else ():
                path = [int(tree.tokens[row, node])] if node >= 0 else []
                after = eagle.logits(published, tensors, text + path, len(text) - 1)[-1]
                expected = (after / 0.8).softmax(-1)
                places = torch.tensor([columns.index(token) for token in tree.q.support[row, 1 + node].tolist()])
                torch.testing.assert_close(
                    tree.q.weights[row, 1 + node].double(), expected[places], atol=1e-4, rtol=1e-3
                )
        path = torch.tensor([[-1, -1], [1, -1], [0, 3]])
        roots = torch.tensor([[text[-1]] for text in texts])
        output = target.forward(
            torch.cat([roots, tree.tokens], 1), TokenLayout.tree(shape), cache, hidden_layers=layers
        )
        kept = torch.nn.functional.pad(path + 1, (1, 0))
        cache.commit(kept, (path >= 0).sum(-1) + 1)
        assert output.hidden is not None
        hidden = output.hidden.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, output.hidden.shape[-1]))
        drafter.commit(path, [[], [1], [0, 3]], hidden)
        for row, text in enumerate(texts):
            text += [int(tree.tokens[row, node]) for node in path[row] if node >= 0] + [11 + step]


LAYER_IDS = [
    Published("specforge"),
    Published("specforge", layer_ids=(1, 3, 7)),
    Published("speculators"),
    Published("speculators", layer_ids=(0, 7)),
]


@pytest.mark.parametrize("published", LAYER_IDS, ids=lambda one: f"{one.format}-{one.layer_ids}")
@pytest.mark.parametrize("native", [False, True])
def test_a_head_reads_the_layers_that_its_configuration_names(
    published: Published, native: bool, tmp_path: Path
) -> None:
    """Layer k of the target adds 1 at place k and nothing else: its input has ones at the places before k."""
    target = marked_target(native)
    head, _ = bound(published, tmp_path, target)
    seen: list[Tensor] = []
    head.head.feature_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    engine = mcsd.Engine(target, head, tree="2x1", max_batch=2, max_length=64)
    engine.generate([[3, 1, 4, 1, 5], [9, 2]], mcsd.SamplingParams(max_new_tokens=6, seed=0))
    places = torch.arange(eagle.HIDDEN)
    expected = torch.cat([(places < layer).float() for layer in published.layer_ids])
    rows = torch.cat(seen)
    rows = rows[rows.abs().sum(-1) > 0]  # Before the first token, and where a batch is padded, there are no states.
    assert len(rows) > 12
    torch.testing.assert_close(rows, expected.expand_as(rows), atol=1e-3, rtol=1e-3)


def marked_target(native: bool) -> DecoderModel:
    """A target whose layer k adds 1 to number k of the hidden states; embeddings are zeros."""
    network = eagle.new_target_network()
    for parameter in network.parameters():
        parameter.data.zero_()
    for index, layer in enumerate(network.model.layers):
        layer.mlp.down_proj.bias.data[index] = 1.0
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.fill_(1.0)
    network.model.norm.weight.data.fill_(1.0)
    if not native:
        return mcsd.models.TransformersModel(network)
    from mcsd import kernels
    from support.decoders import native_decoder

    if not kernels.available():
        pytest.skip("no kernels for this CPU")
    return native_decoder(network)
