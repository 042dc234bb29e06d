"""Decoders of the Llama kind in plain torch: the layers of draft heads, and whole networks without transformers' code.

Importing the modelling code of transformers takes two seconds, more than loading a small model. Classes, modules and
parameters have its names, so state dicts fit, and fusing and packing treat both alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_MODEL_TYPES = {"llama", "qwen2"}
_ROPE_FIELDS = {"rope_type", "rope_theta"}
_MAX_SIZE = 1 << 22
_MAX_LAYERS = 1 << 10


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a network, and what the rest of mcsd reads of a configuration of transformers.

    Attributes:
        qkv_bias, output_bias, mlp_bias: whether these projections have biases.
        qk_norm: whether each head of queries and keys is normalized (Qwen3).
        frequencies: of the rotary embeddings, in radians per position, ``head_dim / 2`` of them; None: those of
            ``rope_theta``.
        rope_scale: factor of cosines and sines.
        Others are named as in transformers.

    Raises:
        ValueError: a size out of range, or sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    frequencies: tuple[float, ...] | None = None
    rope_scale: float = 1.0
    tie_word_embeddings: bool = False

    is_encoder_decoder: ClassVar = False
    name_or_path: ClassVar = ""
    _attn_implementation: ClassVar = "sdpa"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "head_dim"):
            if not 1 <= getattr(self, name) <= _MAX_SIZE:
                raise ValueError(f"{name}={getattr(self, name)} is not from 1 to {_MAX_SIZE}")
        if not 1 <= self.num_hidden_layers <= _MAX_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is not from 1 to {_MAX_LAYERS}")
        if not 1 <= self.num_key_value_heads <= self.num_attention_heads <= _MAX_SIZE or (
            self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2
        ):
            raise ValueError(
                f"{self.num_attention_heads} heads of size {self.head_dim} cannot share {self.num_key_value_heads} "
                "key-value heads"
            )
        if not (0 <= self.rms_norm_eps < inf and 1 <= self.rope_theta < inf):
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} or rope_theta={self.rope_theta} is out of range")
        if not all(0 <= number < inf for number in (self.rope_scale, *(self.frequencies or ()))):
            raise ValueError("the frequencies of the rotary embeddings are out of range")

    def get_text_config(self) -> "LlamaConfig":
        """This configuration; multimodal models of transformers have another one here."""
        return self

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any]) -> "LlamaConfig | None":
        """The configuration in a ``config.json``; None if these classes do not compute what it describes.

        Raises:
            KeyError, TypeError, ValueError: it is broken.
        """
        model_type, rope = fields["model_type"], fields.get("rope_parameters") or {}
        known = (
            model_type in _MODEL_TYPES
            and fields["hidden_act"] == "silu"
            and rope.get("rope_type") == "default"
            and not rope.keys() - _ROPE_FIELDS
            and not fields.get("use_sliding_window")
            and set(fields.get("layer_types") or ()) <= {"full_attention"}
            and "quantization_config" not in fields
        )
        if not known:
            return None
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        heads = int(fields["num_attention_heads"])
        biased = bool(fields.get("attention_bias", False))
        names = (*sizes, "num_key_value_heads", "max_position_embeddings")
        numbers: dict[str, Any] = {name: int(fields[name]) for name in names}
        return cls(
            **numbers,
            head_dim=int(fields.get("head_dim") or fields["hidden_size"] // heads),
            rms_norm_eps=float(fields["rms_norm_eps"]),
            rope_theta=float(rope["rope_theta"]),
            qkv_bias=biased or model_type == "qwen2",
            output_bias=biased and model_type == "llama",
            mlp_bias=bool(fields.get("mlp_bias", False)),
            tie_word_embeddings=bool(fields["tie_word_embeddings"]),
        )


class LlamaRMSNorm(nn.Module):
    """A root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        exact = hidden.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * exact.to(hidden.dtype)


class LlamaRotaryEmbedding(nn.Module):
    """Angles of rotary embeddings (Su et al. 2021, arXiv 2104.09864)."""

    rope_type = "default"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self._size, self._theta = config.head_dim, config.rope_theta
        self._scale = config.rope_scale
        # No buffer: it stays float32 when the dtype of the weights changes.
        self._given = None if config.frequencies is None else torch.tensor(config.frequencies, device="cpu")

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, n, head size]`` of positions ``[B, n]``, in the dtype of ``hidden``."""
        angles = position_ids[..., None].float() * self._frequencies(hidden.device)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self._scale).to(hidden.dtype), (angles.sin() * self._scale).to(hidden.dtype)

    def _frequencies(self, device: torch.device) -> Tensor:
        if self._given is None:
            exponents = torch.arange(0, self._size, 2, dtype=torch.float, device=device) / self._size
            return 1.0 / self._theta**exponents
        if self._given.device != device:
            # Kept, because a CUDA graph captures no copy from the host.
            self._given = self._given.to(device)
        return self._given


class LlamaMLP(nn.Module):
    """A gated MLP (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.gate_proj = nn.Linear(outer, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(outer, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, outer, bias=config.mlp_bias)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary embeddings."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.scaling = config.head_dim**-0.5
        width, shared = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any = None
    ) -> tuple[Tensor, None]:
        """The output ``[B, n, H]`` of hidden states ``[B, n, H]``, as a pair as in transformers.

        Args:
            hidden: the normalized input of the layer.
            angles: of `LlamaRotaryEmbedding`.
            mask: additive ``[B, 1, n, columns]``; None: causal.
            cache: of transformers.
        """
        projections = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in projections)
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        cos, sin = (part[:, :, None] for part in angles)
        queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        return self.o_proj(grouped_query_attention(queries, keys, values, mask, self.scaling)), None


class LlamaDecoderLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any = None) -> Tensor:
        """Hidden states ``[B, n, H]``; see `LlamaAttention.forward`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles, mask, cache)[0]
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class LlamaModel(nn.Module):
    """Decoder layers and the norm after them.

    Args:
        config: sizes.
        embeddings: whether it has token embeddings.
    """

    def __init__(self, config: LlamaConfig, embeddings: bool = True) -> None:
        super().__init__()
        self.config = config
        if embeddings:
            # Initializing an nn.Embedding on the meta device would import torch's compiler.
            weight = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor, cache: Any = None, all_layers: bool = False
    ) -> list[Tensor]:
        """Hidden states ``[B, n, H]``: the normalized output of the last layer.

        Args:
            hidden: embeddings ``[B, n, H]``.
            mask: additive ``[B, 1, n, columns]``; None: causal.
            positions: int64 ``[B, n]``.
            cache: of transformers.
            all_layers: return the input and the output of every layer too, as `ModelOutput` numbers them.
        """
        states = [hidden]
        angles = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            output = layer(states[-1], angles, mask, cache)
            states = [*states, output] if all_layers else [output]
        return [*states[:-1], self.norm(states[-1])]


class LlamaForCausalLM(nn.Module):
    """A causal language model with the part of the interface of ``PreTrainedModel`` that mcsd uses.

    Args:
        config: sizes.
        generation_config: see `mcsd.models.TransformersModel`.
    """

    def __init__(self, config: LlamaConfig, generation_config: Any) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation_config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_tensors(
        cls, config: LlamaConfig, generation_config: Any, tensors: Mapping[str, Tensor]
    ) -> "LlamaForCausalLM":
        """A network with these weights, which are not copied.

        Raises:
            RuntimeError: tensors are missing, unknown or of another shape.
        """
        with torch.device("meta"):
            network = cls(config, generation_config)
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
        network.load_state_dict({**tensors, **tied}, assign=True)
        return network.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.model.norm.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """Token ids to embeddings."""
        embeddings: nn.Module = self.model.embed_tokens
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The last hidden states to logits."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
    ) -> SimpleNamespace:
        """Logits and hidden states, named and shaped as in transformers."""
        hidden = self.model.embed_tokens(input_ids)
        states = self.model(hidden, attention_mask, position_ids, cache, output_hidden_states)
        return SimpleNamespace(logits=self.lm_head(states[-1][:, -logits_to_keep:]), hidden_states=states)


def grouped_query_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Scaled dot-product attention whose query heads share key and value heads, without copies of these.

    Args:
        queries: ``[B, n, heads, size]``.
        keys, values: ``[B, kv heads, columns, size]``.
        mask: additive ``[B, 1, n, columns]``; None: causal.
        scaling: of the scores.

    Returns:
        ``[B, n, heads * size]``.
    """
    batch, length, heads, size = queries.shape
    kv_heads, columns = keys.shape[1:3]
    group = heads // kv_heads
    # The query heads of a group are rows of one product: [B, kv heads, group * n, size].
    queries = queries.reshape(batch, length, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    if length > 1:
        if mask is None:
            mask = torch.ones(1, 1, length, columns, dtype=torch.bool, device=keys.device).tril(columns - length)
        mask = mask.expand(batch, group, -1, -1).reshape(batch, 1, group * length, -1)
    out = nn.functional.scaled_dot_product_attention(
        queries.reshape(batch, kv_heads, group * length, size), keys, values, attn_mask=mask, scale=scaling
    )
    return out.view(batch, heads, length, size).transpose(1, 2).flatten(2)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, n, heads, size]`` by angles ``[B, n, 1, size]``."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
