"""What the cache and the mask promise: a node sees its own path and nothing else, and commit changes nothing."""

import pytest
import torch

from mcsd import TreeShape
from mcsd.models import TokenLayout, TransformersModel
from mcsd.models.kv_cache import KVCache
from mcsd.models.prefill import prefill
from support.tiny import VOCABULARY, tiny

# Largest difference of float32 logits of size about 10, summed in another order.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}

SHAPES = ["4x2x2x1", "chain:4", "none", [-1, -1, -1, 0, 0, 1, 3, 3, 6]]
PROMPTS = [3, 20, 11]


def texts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def started(model: TransformersModel, prompts: list[list[int]], slots: int = 128) -> KVCache:
    cache = model.new_cache(len(prompts), slots)
    for prompt in prompts:
        prefill(model, cache, cache.add(), prompt)
    return cache


def reference(model: TransformersModel, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token, by transformers alone: no cache, no mask of ours."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model.network(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]


def path_to(shape: TreeShape, node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = shape.parents[node]
    return path


@pytest.mark.parametrize("tree", SHAPES, ids=str)
def test_tree_logits_equal_path_logits(family: str, tree: str | list[int]) -> None:
    model, shape = TransformersModel(tiny(family)), TreeShape.parse(tree)
    prompts = texts(PROMPTS)
    nodes = torch.tensor(texts([1 + len(shape)] * len(prompts)))
    output = model.forward(nodes, TokenLayout.tree(shape), started(model, prompts), hidden_layers=(-1,))
    assert output.hidden is not None
    assert output.hidden.shape == (3, 1 + len(shape), 32)
    for row, prompt in enumerate(prompts):
        for column in range(1 + len(shape)):
            path = [nodes[row, 0].item(), *nodes[row, [1 + n for n in path_to(shape, column - 1)]].tolist()]
            torch.testing.assert_close(output.logits[row, column], reference(model, prompt + path), **CLOSE)


def test_logits_after_commit_equal_a_fresh_prefill(family: str) -> None:
    model, shape = TransformersModel(tiny(family)), TreeShape.parse("4x2x2x1")
    prompts = texts(PROMPTS)
    cache = started(model, prompts)
    for step in range(3):
        nodes = torch.tensor(texts([1 + len(shape)] * 3)) + step
        nodes %= VOCABULARY
        model.forward(nodes, TokenLayout.tree(shape), cache)
        # Paths of unequal length, none of them the first child's.
        ends = [[-1, 3, len(shape) - 1], [2, len(shape) - 1, -1], [9, -1, 19]][step]
        paths = [[0, *(1 + node for node in path_to(shape, end))] for end in ends]
        longest = max(map(len, paths))
        cache.commit(
            torch.tensor([path + [0] * (longest - len(path)) for path in paths]),
            torch.tensor([len(path) for path in paths]),
        )
        for row, path in enumerate(paths):
            prompts[row] = prompts[row] + nodes[row, path].tolist()
    assert cache.lengths.tolist() == [len(prompt) for prompt in prompts]
    probe = torch.tensor([[5], [6], [7]])
    logits = model.forward(probe, TokenLayout.chain(1), cache).logits
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[row, -1], reference(model, prompt + probe[row].tolist()), **CLOSE)


def test_a_level_sees_the_levels_before_it(family: str) -> None:
    """As a drafter goes down: root committed, then one forward a level."""
    model, shape = TransformersModel(tiny(family)), TreeShape.parse("2x2")
    prompts = texts(PROMPTS)
    cache = started(model, prompts)
    nodes = torch.tensor(texts([6] * 3))
    offsets, mask = shape.offsets[1:] - 1, shape.mask[1:, 1:]
    model.forward(nodes[:, :2], TokenLayout(offsets[:2], mask[:2, :2]), cache)
    logits = model.forward(nodes[:, 2:], TokenLayout(offsets, mask[2:]), cache).logits
    for row, prompt in enumerate(prompts):
        for leaf in range(2, 6):
            path = nodes[row, path_to(shape, leaf)].tolist()
            torch.testing.assert_close(logits[row, leaf - 2], reference(model, prompt + path), **CLOSE)


def test_rows_are_freed_moved_and_reused(family: str) -> None:
    model = TransformersModel(tiny(family))
    prompts = texts([5, 9, 4])
    cache = started(model, prompts)
    cache.remove(0)
    prompts = [prompts[2], prompts[1]]
    assert cache.lengths.tolist() == [4, 9, 0]
    prompts += texts([13])
    prefill(model, cache, cache.add(), prompts[2])
    cache.remove(2)
    probe = torch.tensor([[5], [6]])
    logits = model.forward(probe, TokenLayout.chain(1), cache).logits
    for row in range(2):
        torch.testing.assert_close(logits[row, -1], reference(model, prompts[row] + probe[row].tolist()), **CLOSE)


def test_nan_in_a_freed_row_does_not_survive() -> None:
    network = tiny("llama")
    model = TransformersModel(network)
    prompts = texts([6, 8])
    cache = started(model, prompts)
    healthy = network.model.embed_tokens.weight.data[1].clone()
    network.model.embed_tokens.weight.data[1] = float("nan")
    broken = model.forward(torch.tensor([[1, 1], [2, 3]]), TokenLayout.chain(2), cache)
    network.model.embed_tokens.weight.data[1] = healthy
    assert broken.logits[0].isnan().all()
    assert not broken.logits[1].isnan().any()
    cache.remove(0)
    prefill(model, cache, cache.add(), prompts[0])
    logits = model.forward(torch.tensor([[5], [6]]), TokenLayout.chain(1), cache).logits
    torch.testing.assert_close(logits[1, -1], reference(model, [*prompts[0], 6]), **CLOSE)


def test_long_prompts_are_read_in_pieces() -> None:
    model = TransformersModel(tiny("gpt2"))
    prompt = texts([200])[0] + texts([50])[0]
    cache = model.new_cache(1, 320)
    hidden = prefill(model, cache, cache.add(), prompt, hidden_layers=(-1,))
    assert hidden is not None
    assert hidden.shape == (1, 250, 32)
    logits = model.forward(torch.tensor([[5]]), TokenLayout.chain(1), cache).logits
    torch.testing.assert_close(logits[0, -1], reference(model, [*prompt, 5]), **CLOSE)


def test_the_wrapped_model_is_not_changed() -> None:
    network = tiny("qwen2")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model = TransformersModel(network)
    model.forward(torch.tensor([[1, 2]]), TokenLayout.chain(2), started(model, texts([4])))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
