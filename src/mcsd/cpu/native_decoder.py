"""A causal language model whose decoder layers run in our kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.native_layers import NativeLayers
from mcsd.models.kv_cache import KVCache
from mcsd.models.layout import TokenLayout
from mcsd.models.llama import LlamaForCausalLM
from mcsd.models.protocol import Cache, DecoderModel, ModelOutput
from mcsd.models.transformers import TransformersModel, check_supported, eos_token_ids

_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
"""Classes of transformers whose logits are the output matrix times the hidden states."""


class NativeDecoder:
    """Embeddings, native layers and an output matrix; a `mcsd.models.DecoderModel`.

    Args:
        network: a ``PreTrainedModel``, fused and packed, that `is_native` accepts. It is not used afterwards.
        name: shown to users.
        vocabulary: int64 ``[K]``, the draft vocabulary that its output matrix was cut to; None: all tokens.
        precision: weight format and kernels, for people.
        load_reference: loads the same model as transformers runs it, without our kernels, for `mcsd verify`.

    Raises:
        UnsupportedModel: see `mcsd.models.TransformersModel`.
    """

    def __init__(
        self,
        network: Any,
        name: str,
        vocabulary: Tensor | None,
        precision: str,
        load_reference: Callable[[], Any],
    ) -> None:
        check_supported(network)
        self._layers = NativeLayers(network.model)
        self.embed_tokens: nn.Module = network.get_input_embeddings()
        self.lm_head: nn.Module = network.get_output_embeddings()
        self.weights: nn.Module = nn.ModuleList([self._layers.weights, self.lm_head])
        self.name = name
        self.vocabulary = vocabulary
        self.precision = precision
        self.config: Any = network.config.get_text_config()
        self.num_layers = len(self._layers)
        self.dtype = self._layers.dtype
        self.vocab_size: int = network.config.vocab_size
        self.max_length: int | None = network.config.max_position_embeddings
        self.device: torch.device = network.device
        self.eos_token_ids = eos_token_ids(network)
        self.generation_config: Any = network.generation_config
        self.reference = load_reference

    @staticmethod
    def is_native(network: Any) -> bool:
        """Whether the kernels reproduce a fused and packed ``PreTrainedModel``."""
        return type(network).__name__ in _MODELS and NativeLayers.is_native(network.model)

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
        # A draft with a smaller padded vocabulary may be given a padding id of the target; any token serves.
        embedding = self.embed_tokens(tokens.clamp(max=self.vocab_size - 1))
        hidden = self._layers.run(embedding, layout, view, all_layers=bool(hidden_layers))
        last = hidden[-1] if logits else hidden[-1][:, -1:]
        chosen = [hidden[layer] for layer in hidden_layers]
        return ModelOutput(self.lm_head(last), torch.cat(chosen, dim=-1) if chosen else None)


def as_decoder(
    network: Any, name: str, vocabulary: Tensor | None, precision: str, load_reference: Callable[[], Any]
) -> DecoderModel:
    """A network in our kernels where they reproduce it, else as transformers runs it; see `NativeDecoder`.

    Raises:
        UnsupportedModel: see `mcsd.models.TransformersModel`.
    """
    if NativeDecoder.is_native(network):
        return NativeDecoder(network, name, vocabulary, precision, load_reference)
    on_cuda = network.device.type == "cuda"
    reference = load_reference if on_cuda or isinstance(network, LlamaForCausalLM) else None
    if on_cuda:
        precision = f"{precision}, CUDA graphs"
    return TransformersModel(network, name, vocabulary, precision, reference, captures=on_cuda)
