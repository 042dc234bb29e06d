"""Causal language models of Hugging Face transformers, as `mcsd.models.LanguageModel`."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mcsd.errors import UnsupportedModel, check_token_ids
from mcsd.models.kv_cache import KVCache
from mcsd.models.layout import TokenLayout
from mcsd.models.masks import make_masks
from mcsd.models.protocol import Cache, ModelOutput
from mcsd.models.unpacked_linear import unpacked_linears

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
_MASKLESS_ATTENTION = ("flash", "flex", "paged")
"""Parts of the names of attention that takes no additive mask."""

# Not cuDNN: it builds a plan of some 30 ms for every new (batch, tokens, columns), and columns grow with every step.
_CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TransformersModel:
    """Wraps a ``PreTrainedModel``; puts it in evaluation mode and changes nothing else.

    Tree attention uses a 4-D additive mask and explicit position ids, so no modelling code is touched.

    Args:
        model: a causal language model with a key-value cache; also a ``PeftModel``, whose adapters stay beside the
            weights, or a module that ``torch.compile`` made, which runs as it was before.
        name: shown to users; by default the path it was loaded from.
        vocabulary: int64 ``[K]``, the token of each logit if the output matrix was cut to a draft vocabulary. Such a
            model can draft; it cannot be a target.
        precision: weight format and kernels, for people; by default the dtype.
        load_reference: loads the network that `mcsd verify` compares the engine with; by default ``model`` itself.
        captures: whether forwards on a GPU may be captured in CUDA graphs, which hooks of the model do not see.

    Attributes:
        network: the ``PreTrainedModel`` itself.
        given: the same, or the ``PeftModel`` around it.
        max_length: the context length; for rotary embeddings that change with the length of the text (LongRoPE) the
            length up to which they do not.
        context: the context length by the configuration.
        window: positions that tokens of sliding-window layers see, their own included.
        generation_config: of the model; see `mcsd.defaults.model_defaults`.

    Raises:
        UnsupportedModel: an encoder, layers without keys and values, positions or attention that a mask and position
            ids do not control, virtual tokens of an adapter, or parameters on several devices.
    """

    def __init__(
        self,
        model: Any,
        name: str | None = None,
        vocabulary: Tensor | None = None,
        precision: str | None = None,
        load_reference: Callable[[], Any] | None = None,
        captures: bool = False,
    ) -> None:
        check_supported(model)
        self.given, model = _uncompiled(model), unwrap(model)
        config = model.config.get_text_config()
        self.network = model.eval()
        self.config: Any = config
        self.name = name or config.name_or_path or type(model).__name__
        self.vocabulary = vocabulary
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.max_length = min((length for length in (self.context, _constant_rope(config)) if length), default=None)
        self.device: torch.device = model.device
        self.eos_token_ids = eos_token_ids(model)
        self.precision = precision or str(model.dtype).removeprefix("torch.")
        self.captures = captures
        self.generation_config: Any = model.generation_config
        self.reference = load_reference or (lambda: self.network)
        self._attention_backends = attention_backends(self.device)
        self._linears = unpacked_linears(model, self.device, model.dtype)
        self._cache_argument = cache_argument(model)
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        only_full = self._layer_types == ["full_attention"]
        self.window: int | None = None if only_full else getattr(config, "sliding_window", None)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.network.dtype  # type: ignore[no-any-return]

    @property
    def embed_tokens(self) -> nn.Module:
        """See `DecoderModel`."""
        return self.network.get_input_embeddings()  # type: ignore[no-any-return]

    @property
    def lm_head(self) -> nn.Module:
        """See `DecoderModel`."""
        return self.network.get_output_embeddings()  # type: ignore[no-any-return]

    @property
    def weights(self) -> nn.Module:
        """See `DecoderModel`."""
        return self.network  # type: ignore[no-any-return]

    def new_cache(self, max_batch: int, max_tokens: int) -> KVCache:
        """An empty cache; see `LanguageModel.new_cache`."""
        return KVCache(self.num_layers, max_batch, max_tokens, self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        layout: TokenLayout,
        cache: Cache,
        sequences: slice = slice(None),
        logits: bool = True,
        hidden_layers: Sequence[int] = (),
    ) -> ModelOutput:
        """One forward; see `LanguageModel.forward`."""
        assert isinstance(cache, KVCache)
        view = cache.view(slice(*sequences.indices(cache.batch_size)), layout)
        masks = make_masks(layout, view.lengths, view.columns, self.dtype, self.max_length, self.window)
        mask: Tensor | dict[str, Tensor] = masks.full
        if masks.sliding is not None:
            by_type = {"full_attention": masks.full, "sliding_attention": masks.sliding}
            mask = {kind: by_type[kind] for kind in self._layer_types} if self._layer_types else masks.sliding
        with self._attention_backends(), self._linears:
            out = self.network(
                # A draft with a smaller padded vocabulary may be given a padding id of the target; any token serves.
                input_ids=tokens.clamp(max=self.vocab_size - 1),
                attention_mask=mask,
                position_ids=masks.positions,
                use_cache=True,
                logits_to_keep=0 if logits else 1,
                output_hidden_states=bool(hidden_layers),
                **{self._cache_argument: view},
            )
        hidden = [out.hidden_states[layer] for layer in hidden_layers]
        return ModelOutput(out.logits, torch.cat(hidden, dim=-1) if hidden else None)

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, n, V]`` of texts ``[B, n]``, by the model as it was given: no cache and no mask of ours."""
        with self._attention_backends():
            out = self.given(input_ids=tokens, attention_mask=None, position_ids=positions, use_cache=False)
        return out.logits  # type: ignore[no-any-return]


def attention_backends(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Makes the context of a forward: it limits the back ends of attention on CUDA, and does nothing on a CPU."""
    return partial(sdpa_kernel, _CUDA_BACKENDS) if device.type == "cuda" else nullcontext


def unwrap(model: Any) -> Any:
    """The ``PreTrainedModel`` in a ``PeftModel``, its adapters in place, or in a module of ``torch.compile``.

    Raises:
        UnsupportedModel: the adapter is made of virtual tokens, which no forward of the model itself reads.
    """
    model = _uncompiled(model)
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    for adapter in model.peft_config.values():
        if getattr(adapter, "is_prompt_learning", False):
            kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
            raise UnsupportedModel(
                f"{type(model).__name__} has an adapter of virtual tokens ({kind}), which is no part of the model",
                "give the model without it, or an adapter of its weights such as LoRA",
            )
    return unwrap(model.get_base_model())


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def check_supported(model: Any) -> None:
    """Check a model of transformers by its configuration, and where its weights are.

    What a configuration does not tell is checked with a small tree: see `mcsd.models.self_check`.

    Raises:
        UnsupportedModel: see `TransformersModel`.
    """
    model = unwrap(model)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 and "meta" in devices:
        raise UnsupportedModel(
            f"{type(model).__name__} has weights that are offloaded or not loaded: they are on {', '.join(devices)}",
            "load all of it on one device, as with device_map={'': 'cuda:0'}",
        )
    if len(devices) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} is spread over the devices {', '.join(devices)}",
            "load all of it on one device, as with device_map={'': 'cuda:0'}",
        )
    if reason := _unsupported(model, model.config.get_text_config()):
        raise UnsupportedModel(f"{type(model).__name__} {reason}", UNSUPPORTED_HINT)


UNSUPPORTED_HINT = "use a decoder-only model with position ids and full or sliding-window attention, eager or sdpa"


def _unsupported(model: Any, config: Any) -> str | None:
    """Why tree attention would be wrong on this model; None if nothing in its configuration says so."""
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    attention = str(model.config._attn_implementation)
    if config.is_encoder_decoder or model.config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if unknown & _RECURRENT_LAYERS or getattr(model, "_is_stateful", False):
        return "keeps a recurrent state, from which the branches of a tree cannot be told apart"
    if unknown:
        return f"has layers of another kind than full and sliding-window attention: {', '.join(sorted(unknown))}"
    if (
        getattr(config, "use_bidirectional_attention", None) in (True, "all")
        or getattr(config, "is_causal", True) is False
    ):
        return "attends to later tokens: its attention is not causal"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "derives positions from cache slots, where siblings of a tree differ"
    if getattr(config, "attention_layers", None):
        return "has local attention over cache slots"
    if any(name in attention for name in _MASKLESS_ATTENTION):
        return f"uses {attention} attention, which takes no tree mask"
    return None


def _constant_rope(config: Any) -> int | None:
    """The length up to which rotary embeddings do not depend on the length of a text; None if they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(fields for fields in rope.values() if isinstance(fields, dict))]
    # "dynamic" embeddings change beyond the context only.
    changing = [fields for fields in each if fields.get("rope_type") == "longrope"]
    default: int | None = getattr(config, "original_max_position_embeddings", None)
    lengths = [fields.get("original_max_position_embeddings", default) for fields in changing]
    return min((length for length in lengths if length), default=None)


def cache_argument(model: Any) -> str:
    """The name of the argument with the key-value cache: ``cache`` since transformers 5.24, before that another."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def eos_token_ids(model: Any) -> frozenset[int]:
    """Tokens that end a text, by the generation config of a ``PreTrainedModel``.

    Raises:
        UnsupportedModel: they are no token ids.
    """
    eos = getattr(model.generation_config, "eos_token_id", None)
    return check_token_ids("eos_token_id of the generation config", eos, UnsupportedModel)
