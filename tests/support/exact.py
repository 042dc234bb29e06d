"""Tiny random models in float64, and the outputs of transformers alone: for the tests of engine and cache states.

In float64 two computations of the same number differ by about 1e-13. So tolerances are tight, and no decision of a test
depends on rounding: a draw or a threshold would have to fall into a gap of that size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from hypothesis import HealthCheck, Phase
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, PreTrainedModel

from mcsd.models import BoundHead, DraftHead, TransformersModel
from mcsd.models.draft_head import HeadConfig
from support.tiny import FAMILIES, VOCABULARY

CONTEXT = 40
"""Positions of a model: few, so that texts reach the end and exceed the sliding windows of 7."""

STATES = (1, -1)
"""The layers whose hidden states are compared, and which a head reads."""

POISON = VOCABULARY - 1
"""A token that no test draws at random: its embedding may become NaN."""


def close(kind: str) -> dict[str, float]:
    """Tolerance: 1e-9, except for transformers' eager attention, whose softmax is in float32."""
    limit = 1e-5 if kind.endswith("eager") else 1e-9
    return {"atol": limit, "rtol": limit}


def _gemma_of_both_kinds() -> PretrainedConfig:
    config = FAMILIES["gemma3-window"]()
    config.layer_types = ["sliding_attention", "full_attention"]
    return config


def _eager_llama() -> PretrainedConfig:
    config = FAMILIES["llama"]()
    config._attn_implementation = "eager"
    return config


def _latent_attention() -> PretrainedConfig:
    """Keys and values of different sizes, by whose compression all heads share one."""
    sizes = FAMILIES["llama"]().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    return DeepseekV3Config(
        **{name: sizes[name] for name in names},
        num_hidden_layers=2,
        first_k_dense_replace=2,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=8,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )


KINDS: dict[str, Callable[[], PretrainedConfig]] = FAMILIES | {
    "deepseek3": _latent_attention,
    "gemma3-mixed": _gemma_of_both_kinds,
    "llama-eager": _eager_llama,
}


@cache
def exact(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float64 with weights large enough for peaked distributions. Cached: do not modify."""
    config = KINDS[kind]()
    config.max_position_embeddings = CONTEXT
    # A NaN embedding must not make a logit NaN too.
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    network: Any = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    norms_in_float64(network)
    return network  # type: ignore[no-any-return]


def norms_in_float64(network: nn.Module) -> None:
    """Replace the norms of transformers, which compute in float32 and would differ by 1e-7."""
    for module in network.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            weight: Any = module.weight
            scale = (1 + weight if kind.startswith("Gemma") else weight).detach()
            epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
            module.forward = partial(  # type: ignore[method-assign]
                nn.functional.rms_norm, normalized_shape=tuple(scale.shape), weight=scale, eps=epsilon
            )


@cache
def exact_head(kind: str, seed: int = 0) -> BoundHead:
    """A random head in float64 for the first model of a kind; its vocabulary is part of the target's."""
    torch.manual_seed(2)
    head = DraftHead(
        HeadConfig("tiny", VOCABULARY, hidden_size=32, hidden_layers=STATES, num_layers=2, vocab_size=70)
    ).double()
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    head.vocabulary.copy_(torch.arange(VOCABULARY)[torch.arange(VOCABULARY) % 4 != 3][:70])
    norms_in_float64(head)
    return BoundHead(head, TransformersModel(exact(kind, seed)), "head")


@torch.no_grad()
def plain(network: Any, texts: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Logits ``[n, V]`` and hidden states ``[n, F]`` for each text: by transformers alone, without a cache."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    there = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
    out = network(ids, attention_mask=there.long(), use_cache=False, output_hidden_states=True)
    states = torch.cat([out.hidden_states[layer] for layer in STATES], dim=-1)
    return [(out.logits[i, : len(text)], states[i, : len(text)]) for i, text in enumerate(texts)]


@contextmanager
def poisoned(network: Any, token: int) -> Iterator[None]:
    """In this context the embedding of ``token`` is NaN."""
    table = network.get_input_embeddings().weight.data
    healthy = table[token].clone()
    table[token] = torch.nan
    try:
        yield
    finally:
        table[token] = healthy


def random_tokens(seed: int, count: int) -> list[int]:
    """Random tokens other than `POISON`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(POISON, (count,), generator=generator).tolist()


SEEDS = st.integers(0, 1 << 16)


@st.composite
def parents(draw: st.DrawFn, largest: int, smallest: int = 0) -> list[int]:
    """Parents of nodes, each -1 or an earlier node: any tree, or some leaves and then a chain.

    The nodes of the latter have indices far from their depths.
    """
    size = draw(st.integers(smallest, largest))
    if draw(st.booleans()):
        return [draw(st.integers(-1, node - 1)) for node in range(size)]
    leaves = draw(st.integers(0, 2))
    return [-1 if node <= leaves else node - 1 for node in range(size)]


def run(machine: Callable[[str], RuleBasedStateMachine], kind: str, runs: int, steps: int) -> None:
    """Run a state machine with the same examples each time."""

    # The default argument is part of the digest that hypothesis seeds from: each kind gets its own examples.
    def factory(kind: str = kind) -> RuleBasedStateMachine:
        return machine(kind)

    run_state_machine_as_test(
        factory,  # type: ignore[arg-type]
        settings=examples(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            # Shrinking a failure takes minutes; add Phase.shrink to have it.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
