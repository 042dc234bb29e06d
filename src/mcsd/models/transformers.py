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

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_KNOWN_ATTENTION = {"eager", "sdpa"}

# Not cuDNN: it builds a plan of some 30 ms for every new (batch, tokens, columns), and columns grow with every step.
_CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TransformersModel:
    """Wraps a ``PreTrainedModel``; puts it in evaluation mode and changes nothing else.

    Tree attention uses a 4-D additive mask and explicit position ids, so no modelling code is touched.

    Args:
        model: a causal language model with a key-value cache.
        name: shown to users; by default the path it was loaded from.
        vocabulary: int64 ``[K]``, the token of each logit if the output matrix was cut to a draft vocabulary. Such a
            model can draft; it cannot be a target.
        precision: weight format and kernels, for people; by default the dtype.
        load_reference: loads the network that `mcsd verify` compares the engine with; by default ``model`` itself.
        captures: whether forwards on a GPU may be captured in CUDA graphs, which hooks of the model do not see.

    Attributes:
        generation_config: of the model; see `mcsd.defaults.model_defaults`.

    Raises:
        UnsupportedModel: an encoder, layers without keys and values, positions or attention that a mask and position
            ids do not control, or parameters on several devices.
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
        config = model.config.get_text_config()
        check_supported(model)
        self.network = model.eval()
        self.name = name or config.name_or_path or type(model).__name__
        self.vocabulary = vocabulary
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.device: torch.device = model.device
        self.eos_token_ids = eos_token_ids(model)
        self.precision = precision or str(model.dtype).removeprefix("torch.")
        self.captures = captures
        self.generation_config: Any = model.generation_config
        self.reference = load_reference or (lambda: self.network)
        self._attention_backends = attention_backends(self.device)
        self._cache_argument = cache_argument(model)
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        only_full = self._layer_types == ["full_attention"]
        self._window: int | None = None if only_full else getattr(config, "sliding_window", None)

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
        masks = make_masks(layout, view.lengths, view.columns, self.dtype, self.max_length, self._window)
        mask: Tensor | dict[str, Tensor] = masks.full
        if masks.sliding is not None:
            by_type = {"full_attention": masks.full, "sliding_attention": masks.sliding}
            mask = {kind: by_type[kind] for kind in self._layer_types} if self._layer_types else masks.sliding
        with self._attention_backends():
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


def attention_backends(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Makes the context of a forward: it limits the back ends of attention on CUDA, and does nothing on a CPU."""
    return partial(sdpa_kernel, _CUDA_BACKENDS) if device.type == "cuda" else nullcontext


def check_supported(model: Any) -> None:
    """Check that tree attention gives the right result on a ``PreTrainedModel``, and that it is on one device.

    Raises:
        UnsupportedModel: see `TransformersModel`.
    """
    if len(devices := {parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} is spread over the devices {', '.join(sorted(map(str, devices)))}",
            "load all of it on one device, as with device_map={'': 'cuda:0'}",
        )
    if reason := _unsupported(model, model.config.get_text_config()):
        raise UnsupportedModel(
            f"{type(model).__name__} {reason}",
            "use a decoder-only model with position ids and full or sliding-window attention, eager or sdpa",
        )


def _unsupported(model: Any, config: Any) -> str | None:
    """Why tree attention would be wrong on this model; None if it is right."""
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown or config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return f"keeps {', '.join(sorted(unknown)) or 'another kind of state'} instead of keys and values"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "derives positions from cache slots, where siblings of a tree differ"
    if getattr(config, "attention_layers", None):
        return "has local attention over cache slots"
    if model.config._attn_implementation not in _KNOWN_ATTENTION:
        return f"uses {model.config._attn_implementation} attention, which takes no tree mask"
    return None


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
