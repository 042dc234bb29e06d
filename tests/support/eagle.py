"""Published draft heads: folders with random weights, and what they compute by the formulas of the papers.

`logits` reads the tensors of a file one token at a time, without anything of mcsd.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from mcsd.models import TransformersModel

VOCABULARY, HIDDEN, LAYERS = 60, 32, 8
"""Of the target."""

KNOWN = [token for token in range(VOCABULARY) if token % 3]
"""The draft vocabulary: it lacks every third token of the target."""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Published:
    """A published head.

    Attributes:
        format: "specforge", "speculators" or "eagle" (EAGLE-1 and 2).
        layer: the model type of its layers.
        num_layers: how many.
        flags: fields of the configuration that change what it computes.
        layer_ids: of the layers whose inputs it reads.
        own_embeddings: whether it has embeddings.
        all_tokens: whether it proposes all tokens of the target.
        scaled_rope: whether the rotary embeddings are those of Llama 3.
        size: of its hidden states.
        heads: attention heads, those of keys and values, and their size.
    """

    format: str
    layer: str = "llama"
    num_layers: int = 1
    flags: Mapping[str, bool] = field(default_factory=dict)
    layer_ids: tuple[int, ...] = (2, 4, 5)
    own_embeddings: bool = False
    all_tokens: bool = False
    scaled_rope: bool = False
    size: int = HIDDEN
    heads: tuple[int, int, int] = (4, 2, 16)

    def __str__(self) -> str:
        parts = [self.format, self.layer, str(self.num_layers), *(name for name, on in self.flags.items() if on)]
        parts += ["scaled-rope" * self.scaled_rope, "own" * self.own_embeddings, str(self.size)]
        return "-".join(filter(None, parts))

    @property
    def fields(self) -> dict[str, Any]:
        """The configuration of its layers, as in transformers."""
        fields: dict[str, Any] = {"model_type": self.layer, "vocab_size": VOCABULARY, "hidden_size": self.size}
        heads, kv_heads, head_dim = self.heads
        fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        fields |= {"hidden_act": "silu"}
        fields |= {"intermediate_size": 48, "num_hidden_layers": self.num_layers, "rms_norm_eps": 1e-5}
        fields |= {"rope_theta": 500.0, "max_position_embeddings": 64}
        fields |= {"attention_bias": bool(self.flags.get("attention_bias"))}
        if self.scaled_rope:
            fields |= {"rope_scaling": LLAMA3}
        return fields

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        known = VOCABULARY if self.all_tokens else len(KNOWN)
        flags = {name: on for name, on in self.flags.items() if name not in ("attention_bias", "bias")}
        if self.format == "eagle":
            return self.fields | {"architectures": ["LlamaForCausalLM"], "bias": bool(self.flags.get("bias"))}
        if self.format == "specforge":
            ids = [layer - 1 for layer in self.layer_ids]
            eagle = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}}
            named: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": known}
            if self.size != HIDDEN:
                named["target_hidden_size"] = HIDDEN
            return self.fields | named | flags | (eagle if self.layer_ids != (2, 4, 5) else {})
        fields: dict[str, Any] = {
            "speculators_model_type": "eagle3",
            "architectures": ["Eagle3Speculator"],
            "draft_vocab_size": known,
        }
        fields |= {"transformer_layer_config": self.fields, "speculators_version": "0.9.0"}
        fields |= {"eagle_aux_hidden_state_layer_ids": list(self.layer_ids), "tie_word_embeddings": False}
        verifier = {"name_or_path": None, "architectures": ["LlamaForCausalLM"]}
        proposal = [{"proposal_type": "greedy", "speculative_tokens": 3}]
        algorithm = {"algorithm": "eagle3", "proposal_methods": proposal, "default_proposal_method": "greedy"}
        fields["speculators_config"] = algorithm | {"verifier": verifier}
        return fields | flags

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Random weights, named as in the files of its format."""
        generator = torch.Generator().manual_seed(seed)
        size, (heads, kv_heads, head) = self.size, self.heads
        found: dict[str, Tensor] = {}

        def matrix(name: str, outputs: int, inputs: int, bias: bool = False) -> None:
            found[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
            if bias:
                found[f"{name}.bias"] = torch.randn(outputs, generator=generator) / 3

        def norm(name: str, width: int) -> None:
            found[f"{name}.weight"] = 0.5 + torch.rand(width, generator=generator)

        is_eagle3, biased = self.format != "eagle", bool(self.flags.get("attention_bias"))
        features = len(self.layer_ids) * HIDDEN
        matrix("fc", size, features if is_eagle3 else 2 * size, not is_eagle3 and bool(self.flags.get("bias")))
        for index in range(self.num_layers):
            is_first = index == 0
            name = "midlayer" if is_first and self.format == "specforge" else f"layers.{index}"
            width = 2 * size if is_first and is_eagle3 else size
            for part, outputs in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
                matrix(f"{name}.self_attn.{part}_proj", outputs, width, biased)
            matrix(f"{name}.self_attn.o_proj", size, heads * head, biased)
            for part in ("gate", "up"):
                matrix(f"{name}.mlp.{part}_proj", 48, size)
            matrix(f"{name}.mlp.down_proj", size, 48)
            norm(f"{name}.post_attention_layernorm", size)
            if is_eagle3 or not is_first:
                norm(f"{name}.input_layernorm", size)
            if is_eagle3 and is_first:
                norm(f"{name}.hidden_norm", size)
            if self.layer == "qwen3":
                norm(f"{name}.self_attn.q_norm", head)
                norm(f"{name}.self_attn.k_norm", head)
        if self.own_embeddings:
            found["embed_tokens.weight"] = torch.randn(VOCABULARY, size, generator=generator)
        if is_eagle3:
            norm("norm", size)
            matrix("lm_head", VOCABULARY if self.all_tokens else len(KNOWN), size)
            found["lm_head.weight"] *= 1.5
            if not self.all_tokens:
                found["d2t"] = torch.tensor(KNOWN) - torch.arange(len(KNOWN))
                found["t2d"] = torch.isin(torch.arange(VOCABULARY), torch.tensor(KNOWN))
        if self.flags.get("norm_before_fc"):
            norm("input_norm", features)
        if self.flags.get("fc_norm"):
            for part in range(len(self.layer_ids)):
                norm(f"fc_norm.{part}", HIDDEN)
        return found

    def write(self, folder: Path, seed: int = 0) -> dict[str, Tensor]:
        """Write it to a folder. Returns its tensors."""
        tensors = self.tensors(seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(tensors, folder / "model.safetensors")
        return tensors


VARIANTS = (
    Published("specforge"),
    Published("specforge", layer_ids=(1, 3, 7), own_embeddings=True, all_tokens=True),
    Published("specforge", own_embeddings=True, size=24),
    Published("specforge", flags={"norm_before_residual": True, "attention_bias": True}),
    Published("speculators"),
    Published("speculators", "qwen3", layer_ids=(0, 7), heads=(6, 3, 8)),
    Published("speculators", "qwen3", 2, flags={"norm_before_residual": True}, own_embeddings=True),
    Published("speculators", flags={"norm_before_fc": True}, scaled_rope=True),
    Published("speculators", flags={"fc_norm": True, "norm_output": True}),
    Published("speculators", "qwen3", 2, flags={"norm_output": True, "attention_bias": True}, all_tokens=True),
    Published("eagle", flags={"bias": True}, own_embeddings=True),
    Published("eagle", num_layers=2),
)
"""Every format, kind of layer and flag."""


@cache
def target_network(layers: int = LAYERS) -> Any:
    """A random Llama in float32. Cached: do not modify."""
    return new_target_network(layers)


def new_target_network(layers: int = LAYERS) -> Any:
    """The same, to be modified."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        mlp_bias=True,
    )
    network = transformers.LlamaForCausalLM(config)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return network.eval()


def target() -> TransformersModel:
    """`target_network`, as mcsd runs it."""
    return TransformersModel(target_network())


@torch.no_grad()
def states(published: Published, text: Sequence[int]) -> Tensor:
    """The target's hidden states ``[n, F]`` that a head reads, by transformers alone."""
    out = target_network()(torch.tensor([text]), output_hidden_states=True)
    ids = published.layer_ids if published.format != "eagle" else (-1,)
    return torch.cat([out.hidden_states[layer][0] for layer in ids], dim=-1)


def logits(published: Published, tensors: Mapping[str, Tensor], text: Sequence[int], read: int) -> Tensor:
    """The head's logits ``[n, K]`` after each token of a text but the first, in float64.

    Args:
        published: the head.
        tensors: its tensors, as in its file.
        text: tokens.
        read: how many of them the target has read: to read a later token than the next one, the head takes its own
            hidden state before it.
    """
    given = states(published, text[:read]).double()
    network = target_network()
    weights = {name.replace("midlayer", "layers.0"): tensor.double() for name, tensor in tensors.items()}
    embeddings = weights.get("embed_tokens.weight", network.get_input_embeddings().weight.detach().double())
    output = weights.get("lm_head.weight", network.get_output_embeddings().weight.detach().double())
    keys: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(published.num_layers)]
    own, found = torch.empty(0), []
    for position in range(1, len(text)):
        embedding = embeddings[text[position]]
        state = _features(published, weights, given[position - 1]) if position <= read else own
        hidden = torch.empty(0)
        for index in range(published.num_layers):
            name = f"layers.{index}"
            if index == 0 and published.format == "eagle":
                hidden = residual = _linear(weights, "fc", torch.cat([embedding, state]))
            elif index == 0:
                normed = _norm(weights, f"{name}.hidden_norm", state)
                residual = normed if published.flags.get("norm_before_residual") else state
                hidden = torch.cat([_norm(weights, f"{name}.input_layernorm", embedding), normed])
            else:
                residual, hidden = hidden, _norm(weights, f"{name}.input_layernorm", hidden)
            residual = residual + _attention(published, weights, f"{name}.self_attn", hidden, position, keys[index])
            normed = _norm(weights, f"{name}.post_attention_layernorm", residual)
            gate, up = (_linear(weights, f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
            hidden = residual + _linear(weights, f"{name}.mlp.down_proj", gate * gate.sigmoid() * up)
        normed = hidden if published.format == "eagle" else _norm(weights, "norm", hidden)
        own = normed if published.flags.get("norm_output") else hidden
        found.append(output @ normed)
    return torch.stack(found)


def tokens_of(published: Published) -> list[int]:
    """The token of each logit."""
    return list(range(VOCABULARY)) if published.all_tokens or published.format == "eagle" else KNOWN


def _linear(weights: Mapping[str, Tensor], name: str, vector: Tensor) -> Tensor:
    product = weights[f"{name}.weight"] @ vector
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def _norm(weights: Mapping[str, Tensor], name: str, vector: Tensor) -> Tensor:
    return weights[f"{name}.weight"] * vector / (vector.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def _features(published: Published, weights: Mapping[str, Tensor], state: Tensor) -> Tensor:
    if published.format == "eagle":
        return state
    if published.flags.get("norm_before_fc"):
        state = _norm(weights, "input_norm", state)
    if published.flags.get("fc_norm"):
        parts = state.chunk(len(published.layer_ids))
        state = torch.cat([_norm(weights, f"fc_norm.{index}", part) for index, part in enumerate(parts)])
    return _linear(weights, "fc", state)


def _attention(
    published: Published,
    weights: Mapping[str, Tensor],
    name: str,
    hidden: Tensor,
    position: int,
    before: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """The attention of one token to those before it and itself; its key and value are appended to ``before``."""
    heads, kv_heads, size = published.heads
    query, key, value = (_linear(weights, f"{name}.{part}_proj", hidden).view(-1, size) for part in "qkv")
    if published.layer == "qwen3":
        query, key = _norm(weights, f"{name}.q_norm", query), _norm(weights, f"{name}.k_norm", key)
    before.append((_rotated(published, key, position), value))
    query = _rotated(published, query, position)
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = torch.stack([query[head] @ key[shared] / math.sqrt(size) for key, _ in before])
        outputs.append(scores.softmax(0) @ torch.stack([value[shared] for _, value in before]))
    return _linear(weights, f"{name}.o_proj", torch.cat(outputs))


def _rotated(published: Published, heads: Tensor, position: int) -> Tensor:
    turned = heads.clone()
    pairs = heads.shape[1] // 2
    for pair in range(pairs):
        angle = position * _frequency(published, pair / pairs)
        first, second = heads[:, pair], heads[:, pair + pairs]
        turned[:, pair] = first * math.cos(angle) - second * math.sin(angle)
        turned[:, pair + pairs] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def _frequency(published: Published, exponent: float) -> float:
    frequency = 500.0**-exponent
    if not published.scaled_rope:
        return frequency
    length = 2 * math.pi / frequency
    if length > 16 / 1.0:
        return frequency / 8.0
    if length < 16 / 4.0:
        return frequency
    smooth = (16 / length - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * frequency / 8.0 + smooth * frequency
