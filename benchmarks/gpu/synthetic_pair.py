"""A target and a draft without a download: random Llama models of full size that agree as much as is wanted.

The first `SHARED` numbers of a token's embedding, its *code*, are equal in both models, and both output matrices read
almost nothing else. Without layers the next token would depend on the last one only, by the same distribution in both
models. The layers are random and of full size. They add noise to the residual stream that differs between the models
and depends on the whole text; its root mean square, all layers together, is ``eps`` of the stream's.

So the acceptance rate depends on ``eps``, and hardly on size or dtype: for one candidate at temperature 1 and a
vocabulary of 32,000 about .85 at .05, .7 at .1 and .55 at .15.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import transformers
from torch import Tensor

SHARED = 64
SHARPNESS = 7.0
"""Standard deviation of the logits: the distributions have about 2.3 nats."""
SPREAD = 0.3
"""Of the logarithm of a token's own sharpness: some tokens are followed by anything, some by one token."""
SUPPORT = 64
"""Tokens of the draft's distribution that the engine draws from."""
_CODE_SEED = 1
_ATTENTION_POWER, _MLP_POWER = 0.25, 0.36
"""Mean square of what attention and MLP give before their last matrix, for inputs of mean square 1."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32000


SHAPES = {
    "13b": ModelShape(5120, 13824, 40, 40),
    "7b": ModelShape(4096, 11008, 32, 32),
    "160m": ModelShape(768, 3072, 12, 12),
    "68m": ModelShape(768, 3072, 2, 12),
    "tiny": ModelShape(128, 256, 4, 4, 2000),
    "tiny-draft": ModelShape(96, 128, 1, 2, 2000),
}
TARGETS, DRAFTS = ("7b", "13b", "tiny"), ("68m", "160m", "tiny-draft")


@dataclass(frozen=True)
class Pair:
    """Two ``LlamaForCausalLM`` with the same vocabulary, and the names of their shapes."""

    target: Any
    draft: Any
    target_name: str
    draft_name: str


def make_pair(target: str, draft: str, device: torch.device, dtype: torch.dtype, eps: float) -> Pair:
    """Make both models on the device.

    Args:
        target, draft: keys of `SHAPES` with equal vocabularies.
        device, dtype: of the weights.
        eps: relative size of the noise that makes them differ.
    """
    models = [
        _make_model(SHAPES[name], name, device, dtype, eps, seed) for seed, name in enumerate((target, draft), start=2)
    ]
    return Pair(models[0], models[1], target, draft)


@torch.no_grad()
def _make_model(shape: ModelShape, name: str, device: torch.device, dtype: torch.dtype, eps: float, seed: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    config.name_or_path = name
    generator = torch.Generator(device).manual_seed(seed)
    inputs, outputs = _codes(shape.vocabulary, device)
    rest = torch.randn(shape.vocabulary, shape.hidden - SHARED, generator=generator, device=device)
    # Every embedding gets a mean square of 1, so that the norm before the output matrix changes nothing.
    power = (shape.hidden - inputs.square().sum(-1, keepdim=True)).clamp(min=1.0)
    rest *= (power / rest.square().sum(-1, keepdim=True)).sqrt()
    model.model.embed_tokens.weight.copy_(torch.cat([inputs, rest], dim=1))
    # No zeros: some hardware multiplies them with less power, and faster.
    model.lm_head.weight.normal_(0.0, 1e-4, generator=generator)
    model.lm_head.weight[:, :SHARED] = outputs * SHARPNESS / sqrt(SHARED)
    for layer in model.model.layers:
        _randomize_layer(layer, eps / sqrt((_ATTENTION_POWER + _MLP_POWER) * shape.layers), generator)
    return model


def _codes(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 ``[V, SHARED]`` twice: the codes of tokens as inputs, scaled by their sharpness, and as outputs."""
    generator = torch.Generator(device).manual_seed(_CODE_SEED)
    inputs, outputs = (torch.randn(vocabulary, SHARED, generator=generator, device=device) for _ in range(2))
    # Equal lengths: no token is more probable after all others.
    inputs, outputs = (sqrt(SHARED) * codes / codes.norm(dim=-1, keepdim=True) for codes in (inputs, outputs))
    scale = torch.randn(vocabulary, 1, generator=generator, device=device).clamp(-2, 2)
    return inputs * torch.exp(SPREAD * scale - SPREAD**2 / 2), outputs


def _randomize_layer(layer: Any, output_scale: float, generator: torch.Generator) -> None:
    """Random linear layers that keep the mean square of their inputs, but for those that write to the stream."""
    # Larger queries and keys: a head attends to a few positions instead of to the average.
    scales = {"q_proj": sqrt(3), "k_proj": sqrt(3), "o_proj": output_scale, "down_proj": output_scale}
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            scale = scales.get(name.rpartition(".")[2], 1.0)
            module.weight.normal_(0.0, scale / sqrt(module.in_features), generator=generator)


@torch.no_grad()
def measure_agreement(pair: Pair, texts: int = 4, new_tokens: int = 32) -> dict[str, float]:
    """Averages over positions of texts that the target samples.

    Returns:
        ``entropy`` of the target in nats; ``acceptance`` of one candidate drawn from the draft, the sum of min(p, q);
        the same with q cut to its `SUPPORT` most probable tokens, as the engine draws; ``same argmax``.
    """
    target, draft = pair.target, pair.draft
    generator = torch.Generator(target.device).manual_seed(0)
    ids = torch.randint(target.config.vocab_size, (texts, 4), generator=generator, device=target.device)
    for _ in range(new_tokens):
        last = target(ids).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(last, 1, generator=generator)], dim=1)
    p, q = (model(ids).logits[:, 3:].flatten(0, 1).float().softmax(-1) for model in (target, draft))
    top, support = q.topk(SUPPORT, dim=-1)
    cut = torch.zeros_like(q).scatter_(1, support, top / top.sum(-1, keepdim=True))
    measured = {
        "entropy": -(p * p.clamp(min=1e-30).log()).sum(-1),
        "acceptance": torch.minimum(p, q).sum(-1),
        "acceptance of the engine": torch.minimum(p, cut).sum(-1),
        "same argmax": (p.argmax(-1) == q.argmax(-1)).float(),
    }
    return {name: float(values.mean()) for name, values in measured.items()}
