"""Draft heads: small decoders on the target's own hidden states (EAGLE, Li et al. 2024, arXiv 2401.15077).

At position t a head reads the target's hidden states at t-1, of several layers (EAGLE-3, arXiv 2503.01840), and the
embedding of token t. From its output follows the distribution of token t+1, over a draft vocabulary (FR-Spec, arXiv
2502.14856), which changes q only. Deeper in a tree, where the target has no hidden states yet, it reads its own.

One module computes mcsd's own heads and the published kinds; their folders are read by `mcsd.loading.published_heads`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mcsd.errors import WeightsCorrupt, one_line
from mcsd.models.draft_vocabulary import check_vocabulary
from mcsd.models.llama import LlamaConfig, LlamaDecoderLayer, LlamaModel, LlamaRMSNorm

HEAD_TYPE = "mcsd-head"
"""``model_type`` in the configuration of a draft head of mcsd."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

_VERSION = 2
"""Of configuration and tensor names. Version 1, whose files name no version, is read too."""

_FIELDS = ("target", "target_vocab_size", "hidden_size", "hidden_layers", "num_layers", "vocab_size")
"""Of the configuration of a head of kind "mcsd"."""

_FIELDS_OF_1 = {"states": "hidden_layers", "layers": "num_layers", "vocabulary": "vocab_size"}
_MODULES_OF_1 = {"fuse": "feature_proj", "join": "input_proj", "body": "decoder"}

MAX_POSITIONS = 1 << 20
"""Positions of a head: its texts are as long as the target's, whatever it was trained on."""


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a draft head, and the target it belongs to.

    Attributes:
        target: name of the target, for people.
        target_vocab_size: of the target.
        hidden_size: of the head, and of the target unless ``target_hidden_size`` says otherwise.
        hidden_layers: layers of the target whose hidden states the head reads; -1 is the last.
        num_layers: decoder layers of the head.
        vocab_size: tokens that it proposes.
        kind: "mcsd" for heads that `mcsd distill` trains, "eagle" (EAGLE-1 and 2) or "eagle3".
        layer: sizes of the decoder layers; None: those of kind "mcsd", which follow from the hidden size.
        layer_fields: of a published head, its decoder layers as a configuration of transformers.
        target_hidden_size: size of the target's hidden states; None: ``hidden_size``.
        own_embeddings: whether the head has token embeddings; else it reads the target's.
        input_bias: of kind "eagle", whether its input projection has a bias.
        feature_norm: of kind "eagle3", how the target's hidden states are normalized before their projection: not at
            all, "each" layer's, or "all" as one vector.
        norm_before_residual: of kind "eagle3", whether the residual of the first layer is the normalized hidden state.
        norm_output: of kind "eagle3", whether the head reads its own hidden states normalized (EAGLE-3.1).

    Raises:
        ValueError: a size out of range.
    """

    target: str
    target_vocab_size: int
    hidden_size: int
    hidden_layers: tuple[int, ...]
    num_layers: int
    vocab_size: int
    kind: Literal["mcsd", "eagle", "eagle3"] = "mcsd"
    layer: LlamaConfig | None = None
    layer_fields: Mapping[str, Any] | None = field(default=None, compare=False)
    target_hidden_size: int | None = None
    own_embeddings: bool = False
    input_bias: bool = False
    feature_norm: Literal["none", "each", "all"] = "none"
    norm_before_residual: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        limits = {"target_vocab_size": 1 << 22, "hidden_size": 1 << 16, "num_layers": 64, "vocab_size": 1 << 22}
        for name, limit in limits.items():
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}={getattr(self, name)!r:.40} is not an integer from 1 to {limit}")
        if not 1 <= len(self.hidden_layers) <= 16 or not all(
            type(layer) is int and abs(layer) < 1 << 16 for layer in self.hidden_layers
        ):
            raise ValueError(f"hidden_layers={self.hidden_layers!r:.40} are not 1 to 16 layers")

    @property
    def feature_size(self) -> int:
        """Size of the target's hidden states of one layer."""
        return self.target_hidden_size or self.hidden_size

    @property
    def num_features(self) -> int:
        """Size of the target's hidden states of all layers that the head reads."""
        return len(self.hidden_layers) * self.feature_size

    @property
    def skips_first(self) -> bool:
        """Whether tokens after the first one of a text do not attend to it.

        Published heads are trained on texts from the second token on, which is the first with a hidden state.
        """
        return self.kind != "mcsd"

    @property
    def embedding_first(self) -> bool:
        """Whether the embedding comes before the hidden state where both are read side by side."""
        return self.kind != "mcsd"

    @property
    def num_heads(self) -> int:
        """Attention heads: of size 64 where that divides the hidden size, else the most with an even head size."""
        wanted = max(1, self.hidden_size // 64)
        return next(n for n in range(wanted, 0, -1) if self.hidden_size % (2 * n) == 0 or n == 1)

    @property
    def decoder(self) -> LlamaConfig:
        """Sizes of the decoder layers."""
        return self.layer or LlamaConfig(
            vocab_size=1,
            hidden_size=self.hidden_size,
            intermediate_size=-(-self.hidden_size * 8 // 3 // 64) * 64,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            max_position_embeddings=MAX_POSITIONS,
        )

    @classmethod
    def from_json(cls, text: str) -> "HeadConfig":
        """Read a configuration of kind "mcsd", of this version or the one before.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not one.
        """
        fields = json.loads(text)
        fields.pop("model_type")
        version = fields.pop("version", 1)
        if version == 1:
            fields = {_FIELDS_OF_1.get(name, name): value for name, value in fields.items()}
        elif version != _VERSION:
            raise ValueError(f"version {version!r:.20} of draft heads is unknown; this release reads 1 and {_VERSION}")
        if fields.keys() != set(_FIELDS):
            raise ValueError(f"its fields are {', '.join(sorted(fields)):.100}, not {', '.join(_FIELDS)}")
        return cls(**fields | {"hidden_layers": tuple(fields["hidden_layers"])})

    def to_json(self) -> str:
        """The configuration of kind "mcsd" as `from_json` reads it."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps({"model_type": HEAD_TYPE, "version": _VERSION, **fields}, indent=1) + "\n"


class PartsNorm(nn.Module):
    """A root-mean-square norm of each of several equal parts of a vector.

    Args:
        parts: how many.
        size: of a part.
        eps: added to the mean of squares.
        weighted: whether there is a weight for each number.
    """

    def __init__(
        self, parts: int, size: int, eps: float = torch.finfo(torch.float32).eps, weighted: bool = False
    ) -> None:
        super().__init__()
        self.parts, self.eps = parts, eps
        self._shape = parts, size
        self.weight = nn.Parameter(torch.ones(parts, size)) if weighted else None

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., parts * size]`` to the same shape."""
        parts = hidden.reshape(*hidden.shape[:-1], *self._shape)
        parts = nn.functional.rms_norm(parts, self._shape[1:], eps=self.eps)
        return (parts if self.weight is None else parts * self.weight).flatten(-2)


class EagleLayer(LlamaDecoderLayer):
    """The first decoder layer of EAGLE-3, whose attention reads embeddings and hidden states side by side.

    Args:
        config: sizes.
        norm_before_residual: whether the residual is the normalized hidden state.
    """

    def __init__(self, config: LlamaConfig, norm_before_residual: bool) -> None:
        super().__init__(config, 0)
        self.norm_before_residual = norm_before_residual
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        attention = self.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            width = getattr(attention, name).out_features
            setattr(attention, name, nn.Linear(2 * config.hidden_size, width, bias=config.qkv_bias))

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the attention, ``[B, n, 2 H]``, and the residual ``[B, n, H]``; see `forward`."""
        embedding, state = hidden.chunk(2, dim=-1)
        normed = self.hidden_norm(state)
        residual = normed if self.norm_before_residual else state
        return torch.cat([self.input_layernorm(embedding), normed], dim=-1), residual

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any = None) -> Tensor:
        """Hidden states ``[B, n, H]``.

        Args:
            hidden: ``[B, n, 2 H]``, embeddings and then hidden states.
            angles, mask, cache: see `LlamaDecoderLayer.forward`.
        """
        pair, residual = self.split(hidden)
        hidden = residual + self.self_attn(pair, angles, mask, cache)[0]
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class DraftHead(nn.Module):
    """The trained part of a draft head.

    The target's hidden states are normalized and projected (`project_features`). With the embeddings of tokens they
    become the input of the decoder layers (`project_inputs`). What these give is what the head reads one position
    later in a tree; `normalize` makes it the input of the output matrix. Steps that a kind lacks are identities.

    Args:
        config: its sizes.

    Attributes:
        embed_tokens, lm_head: of the head; None: the target's.
        vocabulary: int32 ``[K]``, the draft vocabulary.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        size, layers, width = config.hidden_size, len(config.hidden_layers), config.feature_size
        eps = config.decoder.rms_norm_eps
        self.feature_norm: nn.Module = nn.Identity()
        self.feature_proj: nn.Module = nn.Identity()
        if config.kind != "eagle":
            self.feature_proj = nn.Linear(layers * width, size, bias=False)
        self.input_norm: nn.Module = nn.Identity()
        self.input_proj: nn.Module = nn.Identity()
        if config.kind != "eagle3":
            self.input_proj = nn.Linear(2 * size, size, bias=config.input_bias)
        self.decoder = LlamaModel(config.decoder, embeddings=False)
        self.output_norm: nn.Module = nn.Identity()
        self.embed_tokens: nn.Embedding | None = None
        self.lm_head: nn.Linear | None = None
        if config.own_embeddings:
            # Initializing an nn.Embedding on the meta device would import torch's compiler.
            weight = torch.empty(config.target_vocab_size, size)
            self.embed_tokens = nn.Embedding(config.target_vocab_size, size, _weight=weight)
        if config.kind == "mcsd":
            # The scales of layers, and of hidden states and embeddings, differ.
            self.feature_norm, self.input_norm = PartsNorm(layers, width), PartsNorm(2, size)
        elif config.kind == "eagle":
            self.decoder.layers[0].input_layernorm = nn.Identity()
            self.decoder.norm = nn.Identity()  # type: ignore[assignment]
        else:
            if config.feature_norm != "none":
                parts = layers if config.feature_norm == "each" else 1
                self.feature_norm = PartsNorm(parts, layers * width // parts, eps, weighted=True)
            self.decoder.layers[0] = EagleLayer(config.decoder, config.norm_before_residual)
            if not config.norm_output:
                self.output_norm, self.decoder.norm = self.decoder.norm, nn.Identity()  # type: ignore[assignment]
            self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.vocabulary: Tensor
        self.register_buffer("vocabulary", torch.arange(config.vocab_size, dtype=torch.int32))

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states; packed linear layers may keep their weights in another format."""
        layer: Any = self.decoder.layers[0]
        return layer.post_attention_layernorm.weight.dtype  # type: ignore[no-any-return]

    def project_features(self, hidden: Tensor) -> Tensor:
        """The target's hidden states ``[..., F]`` as ``[..., H]``."""
        return self.feature_proj(self.feature_norm(hidden.to(self.dtype)))  # type: ignore[no-any-return]

    def project_inputs(self, state: Tensor, embedding: Tensor) -> Tensor:
        """The input of the decoder layers: ``[B, n, H]``, or ``[B, n, 2 H]`` for the first layer of EAGLE-3.

        Args:
            state: ``[B, n, H]``, projected features of the target, or the head's hidden states one position before.
            embedding: ``[B, n, H]``, of the tokens.
        """
        pair = (embedding, state) if self.config.embedding_first else (state, embedding)
        joined = torch.cat([part.to(self.dtype) for part in pair], dim=-1)
        return self.input_proj(self.input_norm(joined))  # type: ignore[no-any-return]

    def forward(self, state: Tensor, embedding: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The head's hidden states ``[B, n, H]``.

        Args:
            state, embedding: see `project_inputs`.
            mask: additive, ``[B, 1, n, columns]``.
            positions: int64 ``[B, n]``.
            cache: of transformers.
        """
        hidden = self.project_inputs(state, embedding)
        output: Tensor = self.decoder(hidden, mask, positions, cache)[-1]
        return output

    def normalize(self, hidden: Tensor) -> Tensor:
        """What the output matrix reads, ``[..., H]``, of the head's hidden states."""
        return self.output_norm(hidden)  # type: ignore[no-any-return]

    @classmethod
    def from_tensors(cls, config: HeadConfig, tensors: Mapping[str, Tensor]) -> "DraftHead":
        """A draft head with tensors as in its state dict, which are not copied.

        Raises:
            ValueError: tensors are missing, unknown, misshapen or not finite, or the draft vocabulary is none.
        """
        with torch.device("meta"):
            head = cls(config)
        expected = head.state_dict()
        if missing := sorted(expected.keys() - tensors.keys()):
            raise ValueError(f"{len(missing)} tensors are missing: {missing[0]}")
        if unknown := sorted(tensors.keys() - expected.keys()):
            raise ValueError(f"{len(unknown)} tensors are of another architecture: {unknown[0]!r:.80}")
        for key, tensor in tensors.items():
            if tensor.shape != expected[key].shape:
                raise ValueError(f"{key} has the shape {list(tensor.shape)}, not {list(expected[key].shape)}")
            if tensor.is_floating_point() != expected[key].is_floating_point():
                raise ValueError(f"{key} has numbers of the type {str(tensor.dtype).removeprefix('torch.')}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{key} has NaN or infinite numbers")
        check_vocabulary(tensors["vocabulary"], config.target_vocab_size)
        head.load_state_dict(tensors, assign=True)
        return head.requires_grad_(False)

    @classmethod
    def load(cls, folder: Path) -> "DraftHead":
        """Read a draft head of kind "mcsd".

        Raises:
            WeightsCorrupt: configuration or weights cannot be read, or do not belong together.
        """
        try:
            config = HeadConfig.from_json((folder / CONFIG_FILE).read_text())
            return cls.from_tensors(config, _renamed(load_file(folder / WEIGHTS_FILE)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise WeightsCorrupt(
                f"draft head {folder} cannot be read: {one_line(error):.200}",
                f"make it again: mcsd distill --out {folder}",
            ) from error


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of version 1 under today's names."""
    parts = {name: name.partition(".") for name in tensors}
    return {
        f"{_MODULES_OF_1.get(module, module)}{dot}{rest}": tensors[name] for name, (module, dot, rest) in parts.items()
    }
