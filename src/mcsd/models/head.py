"""A draft head: a small decoder on the target's own hidden states (EAGLE, Li et al. 2024, arXiv 2401.15077).

At position t it reads the target's states at t-1, from several layers (EAGLE-3, arXiv 2503.01840), and the embedding
of token t, and gives a state from which the target's own output matrix makes the distribution of token t+1. Further
down a tree, where the target has no states yet, it reads its own. Embeddings and output matrix are the target's and
not stored; the output is trimmed to the likeliest tokens (FR-Spec, arXiv 2502.14856), which changes q only.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from mcsd.errors import UnsupportedModel, VocabularyMismatch, WeightsCorrupt
from mcsd.models.base import Block, LanguageModel, Output
from mcsd.models.cache import KeyValueCache
from mcsd.models.masks import additive, visible
from mcsd.models.native import MOST_TOKENS, NativeHead
from mcsd.models.packing import dense_weight, layer_for, pack, weight_bytes
from mcsd.models.transformers import TransformersModel
from mcsd.models.trimming import check_ids, rows_of

HEAD_TYPE = "mcsd-head"
"""``model_type`` in the configuration of a head."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class HeadConfig:
    """What a head's tensors look like, and which target it belongs to.

    Attributes:
        target: name of the target, for people.
        target_vocab_size, hidden_size: of the target.
        states: layers of the target whose hidden states are read, the last being -1.
        layers: decoder layers of the head.
        vocabulary: tokens that it can propose.
    """

    target: str
    target_vocab_size: int
    hidden_size: int
    states: tuple[int, ...]
    layers: int
    vocabulary: int

    def __post_init__(self) -> None:
        most = {"target_vocab_size": 1 << 22, "hidden_size": 1 << 16, "layers": 64, "vocabulary": 1 << 22}
        for name, bound in most.items():
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= bound:
                raise ValueError(f"{name}={getattr(self, name)!r:.40} is not a whole number from 1 to {bound}")
        if not 1 <= len(self.states) <= 16 or not all(isinstance(layer, int) for layer in self.states):
            raise ValueError(f"states={self.states!r:.40} are not 1 to 16 layers")

    @property
    def heads(self) -> int:
        """Attention heads: of size 64 where that divides, each of an even size."""
        wanted = max(1, self.hidden_size // 64)
        return next(n for n in range(wanted, 0, -1) if self.hidden_size % (2 * n) == 0 or n == 1)


class DraftHead(nn.Module):
    """The trained part.

    Args:
        config: its sizes.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.fuse = nn.Linear(len(config.states) * size, size, bias=False)
        self.join = nn.Linear(2 * size, size, bias=False)
        self.body = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=size,
                intermediate_size=-(-size * 8 // 3 // 64) * 64,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=_MAX_SIZE,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        del self.body.embed_tokens
        self.vocabulary: Tensor
        self.register_buffer("vocabulary", torch.arange(config.vocabulary, dtype=torch.int32))
        """int32 ``[K]``, the tokens that it can propose."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its states; linear layers may be packed in another."""
        return self.body.norm.weight.dtype  # type: ignore[no-any-return]

    def fused(self, states: Tensor) -> Tensor:
        """The target's states ``[..., F]`` as one ``[..., H]``; each layer is normalised, for they differ in size."""
        layers = states.reshape(*states.shape[:-1], len(self.config.states), -1).to(self.dtype)
        return self.fuse(nn.functional.rms_norm(layers, layers.shape[-1:]).flatten(-2))  # type: ignore[no-any-return]

    def forward(self, state: Tensor, embedding: Tensor, mask: Tensor, positions: Tensor, past: Any) -> Tensor:
        """States ``[B, n, H]`` that the output matrix turns into logits.

        Args:
            state: ``[B, n, H]``, fused states of the target, or what this gave one position before.
            embedding: ``[B, n, H]``, of the tokens.
            mask: additive, ``[B, 1, n, columns]``.
            positions: int64 ``[B, n]``.
            past: a cache of transformers.
        """
        pair = torch.stack([state.to(self.dtype), embedding.to(self.dtype)], dim=-2)
        hidden: Tensor = self.join(nn.functional.rms_norm(pair, pair.shape[-1:]).flatten(-2))
        # Not the model's own forward, which takes longer than a layer of a small head.
        angles = self.body.rotary_emb(hidden, position_ids=positions)
        for layer in self.body.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, past_key_values=past)
        normed: Tensor = self.body.norm(hidden)
        return normed

    @classmethod
    def load(cls, folder: Path) -> "DraftHead":
        """Read a head.

        Raises:
            WeightsCorrupt: configuration or weights cannot be read, or do not belong together.
        """
        again = f"make it again with: mcsd distill --out {folder}"
        try:
            fields = json.loads((folder / CONFIG).read_text())
            fields.pop("model_type")
            head = cls(HeadConfig(**fields | {"states": tuple(fields["states"])}))
            head.load_state_dict(load_file(folder / WEIGHTS))
            check_ids(head.vocabulary, head.config.target_vocab_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise WeightsCorrupt(f"draft head {folder} cannot be read: {error!s:.200}", again) from error
        return head

    def config_json(self) -> str:
        """What `load` reads as configuration."""
        return json.dumps({"model_type": HEAD_TYPE, **asdict(self.config)}, indent=1) + "\n"


class BoundHead:
    """A head on its target, ready to draft.

    Args:
        head: the trained part; its dtype and device become the target's.
        target: whose states it reads.
        quantize: as for `mcsd.models.loading.load`.

    Raises:
        VocabularyMismatch, UnsupportedModel: it belongs to another target.
    """

    def __init__(self, head: DraftHead, target: LanguageModel, name: str, quantize: str | None = None) -> None:
        config = head.config
        if not isinstance(target, TransformersModel):
            raise UnsupportedModel(f"draft {name} is a head, and {target.name} shows no states", "choose another draft")
        table = target.network.get_input_embeddings()
        output = target.network.get_output_embeddings()
        if config.target_vocab_size != target.vocab_size:
            raise VocabularyMismatch(
                f"draft {name} is a head for {config.target_vocab_size} tokens, target {target.name} has "
                f"{target.vocab_size}",
                f"it belongs to {config.target}; make one with: mcsd distill",
            )
        weight = dense_weight(output)
        if weight.shape[1] != config.hidden_size or table.weight.shape[1] != config.hidden_size:
            raise UnsupportedModel(
                f"draft {name} reads states of size {config.hidden_size}, target {target.name} has {weight.shape[1]}",
                f"it belongs to {config.target}; make one with: mcsd distill",
            )
        if not all(-1 <= layer <= target.layers for layer in config.states):
            raise UnsupportedModel(
                f"draft {name} reads layer {max(config.states)}, target {target.name} has {target.layers}",
                f"it belongs to {config.target}; make one with: mcsd distill",
            )
        self.name = name
        self.target = target
        self.device = target.device
        self.config = config
        self.dtype: torch.dtype = target.network.dtype
        self._head = head.to(self.device, self.dtype).eval()
        self.vocabulary: Tensor = head.vocabulary.to(self.device, torch.int64)
        """int64 ``[K]``, which token each logit stands for."""
        self._table = table
        chosen = rows_of(output, self.vocabulary).to(self.dtype)
        self._output: nn.Module = chosen
        layer = layer_for(self.device, self.dtype, draft=True, quantize=quantize)
        if layer:
            pack(self._head, layer)
            self._output = layer(chosen)
        self._native = NativeHead(self._head, self._output) if NativeHead.fits(self._head, self._output) else None

    def new_cache(self, rows: int, slots: int) -> KeyValueCache:
        """An empty cache; see `LanguageModel.new_cache`."""
        return KeyValueCache(self.config.layers, rows, slots, self.device)

    @property
    def weight_bytes(self) -> int:
        """What a forward of a few tokens reads; see `mcsd.models.packing.weight_bytes`."""
        return weight_bytes(self._head) + weight_bytes(self._output)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        states: Tensor,
        block: Block,
        cache: KeyValueCache,
        rows: slice = slice(None),
        logits: bool = True,
        own: bool = False,
    ) -> Output:
        """Read in-flight tokens; see `LanguageModel.forward`.

        Args:
            tokens: int64 ``[B, n]``.
            states: one position before each token, the target's ``[B, n, F]``, or, if ``own``, the head's
                ``[B, n, H]``.
            block, cache, rows: as there.
            logits: whether logits are wanted.

        Returns:
            Logits ``[B, n, K]`` of `vocabulary`, for all columns or none, and the head's own states.
        """
        rows = slice(*rows.indices(cache.used))
        embedded, view = self._table(tokens), cache.view(rows, block)
        if self._native and tokens.numel() <= MOST_TOKENS:
            hidden, found = self._native.forward(states, own, embedded, view, logits)
            return Output(found, hidden)
        mask = additive(visible(block, view.lengths, view.columns), self.dtype)
        positions = (view.lengths[:, None] + block.offsets.to(self.device))[:, block.before :]
        hidden = self._head(states if own else self._head.fused(states), embedded, mask, positions, view)
        return Output(self._output(hidden if logits else hidden[:, :0]), hidden)
