"""A draft head: a small decoder on the target's own hidden states (EAGLE, Li et al. 2024, arXiv 2401.15077).

At position t it reads the target's hidden states at t-1, of several layers (EAGLE-3, arXiv 2503.01840), and the
embedding of token t. From its output the target's own output matrix computes the distribution of token t+1. Deeper in
a tree, where the target has no hidden states yet, it reads its own. Embeddings and output matrix are the target's and
not stored; the output matrix is cut to a draft vocabulary (FR-Spec, arXiv 2502.14856), which changes q only.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mcsd.errors import UnsupportedModel, VocabularyMismatch, WeightsCorrupt
from mcsd.models.draft_vocabulary import check_vocabulary, input_size, output_rows
from mcsd.models.kv_cache import CacheView, KVCache
from mcsd.models.layout import TokenLayout
from mcsd.models.llama import LlamaConfig, LlamaModel
from mcsd.models.masks import make_masks
from mcsd.models.protocol import DecoderModel, LanguageModel, ModelOutput
from mcsd.models.transformers import attention_backends

HEAD_TYPE = "mcsd-head"
"""``model_type`` in the configuration of a draft head."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

_VERSION = 2
"""Of configuration and tensor names. Version 1, whose files name no version, is read too."""

_FIELDS_OF_1 = {"states": "hidden_layers", "layers": "num_layers", "vocabulary": "vocab_size"}
_MODULES_OF_1 = {"fuse": "feature_proj", "join": "input_proj", "body": "decoder"}

_MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a draft head, and the target it belongs to.

    Attributes:
        target: name of the target, for people.
        target_vocab_size, hidden_size: of the target.
        hidden_layers: layers of the target whose hidden states the head reads; -1 is the last.
        num_layers: decoder layers of the head.
        vocab_size: tokens that it proposes.
    """

    target: str
    target_vocab_size: int
    hidden_size: int
    hidden_layers: tuple[int, ...]
    num_layers: int
    vocab_size: int

    def __post_init__(self) -> None:
        limits = {"target_vocab_size": 1 << 22, "hidden_size": 1 << 16, "num_layers": 64, "vocab_size": 1 << 22}
        for name, limit in limits.items():
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}={getattr(self, name)!r:.40} is not an integer from 1 to {limit}")
        if not 1 <= len(self.hidden_layers) <= 16 or not all(isinstance(layer, int) for layer in self.hidden_layers):
            raise ValueError(f"hidden_layers={self.hidden_layers!r:.40} are not 1 to 16 layers")

    @property
    def num_heads(self) -> int:
        """Attention heads: of size 64 where that divides the hidden size, else the most with an even head size."""
        wanted = max(1, self.hidden_size // 64)
        return next(n for n in range(wanted, 0, -1) if self.hidden_size % (2 * n) == 0 or n == 1)

    @classmethod
    def from_json(cls, text: str) -> "HeadConfig":
        """Read a configuration of this version or the one before.

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
        return cls(**fields | {"hidden_layers": tuple(fields["hidden_layers"])})

    def to_json(self) -> str:
        """The configuration as `from_json` reads it."""
        return json.dumps({"model_type": HEAD_TYPE, "version": _VERSION, **asdict(self)}, indent=1) + "\n"


class DraftHead(nn.Module):
    """The trained part of a draft head.

    Args:
        config: its sizes.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.feature_proj = nn.Linear(len(config.hidden_layers) * size, size, bias=False)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=size,
                intermediate_size=-(-size * 8 // 3 // 64) * 64,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                head_dim=size // config.num_heads,
                max_position_embeddings=_MAX_POSITIONS,
            ),
            embeddings=False,
        )
        self.vocabulary: Tensor
        self.register_buffer("vocabulary", torch.arange(config.vocab_size, dtype=torch.int32))
        """int32 ``[K]``, the draft vocabulary."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states; packed linear layers may keep their weights in another format."""
        return self.decoder.norm.weight.dtype

    def project_features(self, hidden: Tensor) -> Tensor:
        """The target's hidden states ``[..., F]`` as ``[..., H]``; each layer is normalized, as their scales differ."""
        layers = hidden.reshape(*hidden.shape[:-1], len(self.config.hidden_layers), -1).to(self.dtype)
        features = nn.functional.rms_norm(layers, layers.shape[-1:]).flatten(-2)
        return self.feature_proj(features)  # type: ignore[no-any-return]

    def project_inputs(self, state: Tensor, embedding: Tensor) -> Tensor:
        """The input ``[B, n, H]`` of the decoder layers.

        Args:
            state: ``[B, n, H]``, projected features of the target, or the head's hidden states one position before.
            embedding: ``[B, n, H]``, of the tokens.
        """
        pair = torch.stack([state.to(self.dtype), embedding.to(self.dtype)], dim=-2)
        projected: Tensor = self.input_proj(nn.functional.rms_norm(pair, pair.shape[-1:]).flatten(-2))
        return projected

    def forward(self, state: Tensor, embedding: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Hidden states ``[B, n, H]`` from which the output matrix computes logits.

        Args:
            state, embedding: see `project_inputs`.
            mask: additive, ``[B, 1, n, columns]``.
            positions: int64 ``[B, n]``.
            cache: of transformers.
        """
        hidden = self.project_inputs(state, embedding)
        output: Tensor = self.decoder(hidden, mask, positions, cache)[-1]
        return output

    @classmethod
    def load(cls, folder: Path) -> "DraftHead":
        """Read a draft head.

        Raises:
            WeightsCorrupt: configuration or weights cannot be read, or do not belong together.
        """
        try:
            head = cls(HeadConfig.from_json((folder / CONFIG_FILE).read_text()))
            head.load_state_dict(_renamed(load_file(folder / WEIGHTS_FILE)))
            check_vocabulary(head.vocabulary, head.config.target_vocab_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise WeightsCorrupt(
                f"draft head {folder} cannot be read: {error!s:.200}", f"make it again: mcsd distill --out {folder}"
            ) from error
        return head


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of version 1 under today's names."""
    parts = {name: name.partition(".") for name in tensors}
    return {
        f"{_MODULES_OF_1.get(module, module)}{dot}{rest}": tensors[name] for name, (module, dot, rest) in parts.items()
    }


class BoundHead:
    """A draft head bound to its target, ready to draft.

    Args:
        head: the trained part; it is moved to the target's dtype and device.
        target: whose hidden states it reads.
        name: shown to users.
        precision: weight format and kernels, for people; by default the dtype.

    Raises:
        VocabularyMismatch, UnsupportedModel: it belongs to another target.
    """

    def __init__(self, head: DraftHead, target: LanguageModel, name: str, precision: str | None = None) -> None:
        self.target = _checked(head.config, target, name)
        self.name = name
        self.precision = precision or str(self.target.dtype).removeprefix("torch.")
        self.device = target.device
        self.captures: bool = getattr(target, "captures", False)
        self._attention_backends = attention_backends(self.device)
        self.config = head.config
        self.dtype: torch.dtype = self.target.dtype
        self.head = head.to(self.device, self.dtype).eval()
        self.vocabulary: Tensor = head.vocabulary.to(self.device, torch.int64)
        """int64 ``[K]``, the token of each logit."""
        self.lm_head: nn.Module = output_rows(self.target.lm_head, self.vocabulary).to(self.dtype)

    @property
    def weights(self) -> nn.Module:
        """See `DecoderModel`."""
        return nn.ModuleList([self.head, self.lm_head])

    def new_cache(self, max_batch: int, max_tokens: int) -> KVCache:
        """An empty cache; see `LanguageModel.new_cache`."""
        return KVCache(self.config.num_layers, max_batch, max_tokens, self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        layout: TokenLayout,
        cache: KVCache,
        sequences: slice = slice(None),
        logits: bool = True,
        own: bool = False,
    ) -> ModelOutput:
        """Read in-flight tokens; see `LanguageModel.forward`.

        Args:
            tokens: int64 ``[B, n]``.
            hidden: hidden states one position before each token: the target's ``[B, n, F]``, or, if ``own``, the
                head's ``[B, n, H]``.
            layout, cache, sequences: as there.
            logits: whether to compute logits.

        Returns:
            Logits ``[B, n, K]`` of `vocabulary`, of all columns or none, and the head's own hidden states.
        """
        view = cache.view(slice(*sequences.indices(cache.batch_size)), layout)
        return self._run(self.target.embed_tokens(tokens), hidden, layout, view, logits, own)

    def _run(
        self, embedding: Tensor, hidden: Tensor, layout: TokenLayout, view: CacheView, logits: bool, own: bool
    ) -> ModelOutput:
        masks = make_masks(layout, view.lengths, view.columns, self.dtype)
        state = hidden if own else self.head.project_features(hidden)
        with self._attention_backends():
            output = self.head(state, embedding, masks.full, masks.positions, view)
        return ModelOutput(self.lm_head(output if logits else output[:, :0]), output)


def _checked(config: HeadConfig, target: LanguageModel, name: str) -> DecoderModel:
    """The target, if the head belongs to it."""
    if not isinstance(target, DecoderModel):
        raise UnsupportedModel(f"draft {name} is a head; {target.name} has no hidden states", "choose another draft")
    belongs = f"it belongs to {config.target}; make one with: mcsd distill"
    if config.target_vocab_size != target.vocab_size:
        raise VocabularyMismatch(
            f"draft {name} is a head for {config.target_vocab_size} tokens, target {target.name} has "
            f"{target.vocab_size}",
            belongs,
        )
    width, embedding_width = map(input_size, (target.lm_head, target.embed_tokens))
    if not config.hidden_size == width == embedding_width:
        raise UnsupportedModel(
            f"draft {name} reads hidden states of size {config.hidden_size}, target {target.name} has {width}", belongs
        )
    if not all(-1 <= layer <= target.num_layers for layer in config.hidden_layers):
        raise UnsupportedModel(
            f"draft {name} reads layer {max(config.hidden_layers)}, target {target.name} has {target.num_layers}",
            belongs,
        )
    return target
