"""Any causal language model of Hugging Face transformers, behind `mcsd.models.LanguageModel`."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mcsd.errors import UnsupportedModel
from mcsd.models import native
from mcsd.models.base import Block, Cache, Output
from mcsd.models.cache import KeyValueCache
from mcsd.models.masks import additive, visible
from mcsd.models.packing import weight_bytes

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_KNOWN_ATTENTION = {"eager", "sdpa"}


class TransformersModel:
    """Wraps a ``PreTrainedModel``; puts it in evaluation mode and changes nothing else.

    Tree attention goes through a 4-D mask and explicit positions, so no modelling code is touched; a model whose layers
    run in our kernels (see `mcsd.models.native`) reads the block itself.

    Args:
        model: a causal language model with a key-value cache.
        name: for people; by default the path it was loaded from.
        vocabulary: int64 ``[K]``, the token that each logit stands for, where its output matrix is trimmed; such a
            model can draft and not be drafted for.

    Raises:
        UnsupportedModel: it has an encoder, layers without keys and values, positions or attention that a mask and
            position ids do not govern.
    """

    def __init__(self, model: Any, name: str | None = None, vocabulary: Tensor | None = None) -> None:
        config = model.config.get_text_config()
        if why := _unsupported(model, config):
            raise UnsupportedModel(
                f"{type(model).__name__} {why}",
                "decoder-only models with position ids and full or sliding-window attention, eager or sdpa, will do",
            )
        self.network = model.eval()
        """The model itself."""
        self.name = name or config.name_or_path or type(model).__name__
        self.vocabulary = vocabulary
        self.layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.device: torch.device = model.device
        self.eos_token_ids = _eos_token_ids(model)
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        self._window: int | None = getattr(config, "sliding_window", None)

    def new_cache(self, rows: int, slots: int) -> KeyValueCache:
        """An empty cache; see `LanguageModel.new_cache`."""
        return KeyValueCache(self.layers, rows, slots, self.device)

    @property
    def weight_bytes(self) -> int:
        """What a forward of a few tokens reads; see `mcsd.models.packing.weight_bytes`."""
        return weight_bytes(self.network)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        block: Block,
        cache: Cache,
        rows: slice = slice(None),
        logits: bool = True,
        hidden: Sequence[int] = (),
    ) -> Output:
        """One forward; see `LanguageModel.forward`."""
        assert isinstance(cache, KeyValueCache)
        rows = slice(*rows.indices(cache.used))
        view = cache.view(rows, block)
        mask: Tensor | dict[str, Tensor] | None = None
        positions: Tensor | None = None
        if not native.reads_blocks(self.network, tokens.numel()):
            every = view.lengths[:, None] + block.offsets.to(self.device)
            if self.max_length is not None:
                # A tree may hang over the end of the context; what stands there is never emitted.
                every = every.clamp(max=self.max_length - 1)
            mask, positions = self._masks(block, view.lengths, every, view.columns), every[:, block.before :]
        out = self.network(
            # A draft with a smaller padded vocabulary may be shown a padding id of the target: any token will do.
            input_ids=tokens.clamp(max=self.vocab_size - 1),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=view,
            use_cache=True,
            logits_to_keep=0 if logits else 1,
            output_hidden_states=bool(hidden),
        )
        states = [out.hidden_states[layer] for layer in hidden]
        return Output(out.logits, torch.cat(states, dim=-1) if states else None)

    def _masks(self, block: Block, lengths: Tensor, positions: Tensor, longest: int) -> Tensor | dict[str, Tensor]:
        """Additive masks ``[B, 1, n, longest]``, one for each kind of layer where there are several."""
        dtype = self.network.dtype
        full = visible(block, lengths, longest)
        if self._window is None or self._layer_types == ["full_attention"]:
            return additive(full, dtype)
        # Committed columns stand at their slot, in-flight ones where their offset says.
        known = block.mask.shape[1]
        places = torch.arange(longest + known, device=self.device).expand(len(lengths), -1).clone()
        places.scatter_(1, lengths[:, None] + torch.arange(known, device=self.device), positions)
        near = places[:, None, :longest] > positions[:, block.before :, None] - self._window
        sliding = additive(full & near, dtype)
        if "full_attention" in self._layer_types:
            return {"full_attention": additive(full, dtype), "sliding_attention": sliding}
        return {"sliding_attention": sliding} if self._layer_types else sliding


def _unsupported(model: Any, config: Any) -> str | None:
    """Why tree attention would be wrong on this model, if it would."""
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown or config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return f"keeps {', '.join(sorted(unknown)) or 'another kind of state'} instead of keys and values"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "takes positions from places in the cache, where a tree's siblings differ"
    if getattr(config, "attention_layers", None):
        return "has a local attention that counts places in the cache"
    if model.config._attn_implementation not in _KNOWN_ATTENTION:
        return f"runs {model.config._attn_implementation}, which takes no tree mask"
    return None


def _eos_token_ids(model: Any) -> frozenset[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([eos] if isinstance(eos, int) else eos or ())
