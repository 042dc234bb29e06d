"""The target's distribution with draft vocabularies (FR-Spec), on a real network.

Of a head, which reads the target's hidden states, and of a model.

False alarms: 10⁻³ for the file. Power: of texts of three tokens, 2·10⁴ a case and 8·10³ of published heads, a
verification that is wrong by 10 % is rejected with a probability of 0.999, by the noncentral chi-square distribution
with a parameter estimated from 4·10⁴ texts. The last test shows it.
"""

import os
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mcsd
from mcsd.models import BoundHead, DraftHead, TransformersModel
from mcsd.models.draft_head import HeadConfig
from mcsd.models.draft_vocabulary import cut_vocabulary
from mcsd.models.llama import LlamaConfig
from support.broken_schemes import Broken
from support.chisquare import START, chi_square, others_slow, p_value, runnable, sample

SEQUENCES = int(os.environ.get("MCSD_LAW_SEQUENCES", "20000"))
SEQUENCES_OF_PUBLISHED = SEQUENCES * 2 // 5
VOCABULARY = 6
WIDE = dict(runnable("chain:3", "2x1", "3x2"))
"""The widest tree that each scheme supports."""

CASES = [(scheme, tree, 1.0) for scheme, tree in WIDE.items()] + [("mcss-wor", "2x1", 0.7)]
TRIMMED = ["mcss", "mcss-wor"]
LEVEL = 1e-3 / (2 * len(CASES) + len(TRIMMED) + 1)


def engine(tree: str, scheme: str = "mcss-wor", kind: str = "mcsd") -> mcsd.Engine:
    """A random target, and a random head whose vocabulary lacks two of its six tokens."""
    torch.manual_seed(11)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    plain = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **plain))
    fields: dict[str, Any] = {"hidden_layers": (1, -1)}
    if kind == "eagle3":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
        layer = LlamaConfig(VOCABULARY, 16, 32, 1, **heads)
        fields = {"hidden_layers": (0, 1, 1), "kind": kind, "layer": layer, "feature_norm": "each"}
    head = DraftHead(HeadConfig("random", VOCABULARY, hidden_size=16, num_layers=1, vocab_size=4, **fields))
    head.vocabulary.copy_(torch.tensor([0, 2, 3, 5]))
    for parameter in (*network.parameters(), *head.parameters()):
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5)
    network.lm_head.weight.data *= 0.4  # No token is nearly certain: every sequence occurs.
    target = TransformersModel(network)
    draft = BoundHead(head, target, "head")
    return mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=2048, max_length=8)


def trimmed(tree: str, scheme: str = "mcss-wor") -> mcsd.Engine:
    """The same target, and a random model whose vocabulary lacks two of its six tokens."""
    target = engine(tree).target
    assert isinstance(target, TransformersModel)
    network = transformers.LlamaForCausalLM(target.network.config)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    chosen = torch.tensor([0, 2, 3, 5])
    cut_vocabulary(network, chosen)
    draft = TransformersModel(network, "trimmed", chosen)
    return mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=2048, max_length=8)


def seen(subject: mcsd.Engine, temperature: float, sequences: int = SEQUENCES) -> float:
    """The p-value of texts of three tokens."""
    (counts,) = sample(subject, [mcsd.SamplingParams(temperature=temperature)], sequences, 31, blocks=1)
    assert counts[START].sum() == counts.sum() == sequences
    return p_value(chi_square(counts[START, None], law(subject, temperature)))


def law(subject: mcsd.Engine, temperature: float) -> Tensor:
    """The target's own probability of every sequence, ``[1, V³]``, from transformers alone."""
    ids = torch.cartesian_prod(torch.tensor([START]), *[torch.arange(VOCABULARY)] * 3)
    with torch.no_grad():
        logits = subject.target.network(ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[attr-defined]
    chances = (logits[:, :-1].double() / temperature).softmax(-1).gather(2, ids[:, 1:, None])
    return chances[..., 0].prod(1)[None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scheme", "tree", "temperature"),
    others_slow(CASES, lambda scheme, tree, temperature: scheme in ("mcss-wor", "block", "top-k")),
)
def test_law(scheme: str, tree: str, temperature: float) -> None:
    assert seen(engine(tree, scheme), temperature) > LEVEL


@pytest.mark.parametrize(("scheme", "tree", "temperature"), CASES)
def test_law_of_a_published_head(scheme: str, tree: str, temperature: float) -> None:
    assert seen(engine(tree, scheme, "eagle3"), temperature, SEQUENCES_OF_PUBLISHED) > LEVEL


@pytest.mark.parametrize("scheme", TRIMMED)
def test_law_of_a_trimmed_model(scheme: str) -> None:
    assert seen(trimmed("3x2", scheme), 1.0) > LEVEL


@pytest.mark.parametrize(("kind", "sequences"), [("mcsd", SEQUENCES), ("eagle3", SEQUENCES_OF_PUBLISHED)])
def test_a_broken_scheme_is_rejected(kind: str, sequences: int) -> None:
    subject = engine("3x2", kind=kind)
    subject._scheme = Broken()
    assert seen(subject, 1.0, sequences) < LEVEL
