"""From a name, folder, GGUF file or hub id to a model and its tokenizer. Safetensors and GGUF only, no remote code."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mcsd import kernels
from mcsd.config import LoadOptions, split_draft
from mcsd.cpu.draft_int4 import pack_int4, round_to_int4
from mcsd.cpu.native_decoder import as_decoder
from mcsd.cpu.native_draft_head import bind_head
from mcsd.cpu.packing import pack
from mcsd.cpu.reference import quantize_reference
from mcsd.cpu.weight_plan import Role, WeightPlan, auto_dtype, plan_weights
from mcsd.cuda.layers import fuse_for_cuda, fused_copy
from mcsd.defaults import model_defaults
from mcsd.errors import DownloadFailed, InvalidOption, McsdWarning, ModelError, UnknownModel, WeightsCorrupt
from mcsd.kernels import WeightFormat
from mcsd.loading.catalog import Location, default_draft, entry_of, locate
from mcsd.loading.converted import read_converted
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.gguf_network import keeps_weights, read_gguf_network, warn_of_unread_types
from mcsd.loading.int8_cache import pack_from_int8_cache
from mcsd.loading.pretrained import find_tokenizer, read_location, weights_too_large
from mcsd.loading.published_heads import load_head
from mcsd.models.compatibility import match_tokenizers
from mcsd.models.draft_vocabulary import cut_vocabulary, load_vocabulary
from mcsd.models.protocol import DecoderModel
from mcsd.models.transformers import TransformersModel, unwrap

_CPU = torch.device("cpu")

_INT8_WEIGHTS = (WeightFormat.W8A8, WeightFormat.W8A16)


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer.

    Attributes:
        model: the model.
        tokenizer: None if the weights have none.
        format: of its linear layers; None: those of its dtype, or unknown.
    """

    model: DecoderModel
    tokenizer: Any | None
    format: WeightFormat | None = None


@dataclass(frozen=True)
class LoadedPair:
    """A target and its draft: what `load_draft` returns."""

    target: LoadedModel
    draft: Any

    def both(self, name: Any) -> Any:
        """The draft, and look-up beside it or in its place if the draft's name says so."""
        _, look_up = split_draft(name)
        return self.draft if look_up is None else look_up if self.draft == "ngram" else [self.draft, look_up]


def resolve_device(device: str) -> torch.device:
    """A device by name, with its index; ``auto``: CUDA if available, else the CPU.

    Raises:
        InvalidOption: this machine does not have the device.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise InvalidOption(f"device {device!r:.40} cannot be used here: {reason:.100}", "auto or cpu") from error


def resolve_dtype(dtype: str, device: torch.device, in_file: bool = False) -> torch.dtype:
    """A dtype by its name in `mcsd.config.DTYPES`; ``auto``: see `auto_dtype`.

    With weights that stay as they are in a GGUF file (``in_file``) auto is float32 on a CPU: other than the weights'
    size, that of hidden states and of the KV cache takes little time, and the output follows the file most closely.
    """
    if dtype == "auto":
        return torch.float32 if in_file and device.type == "cpu" and kernels.has_kernels() else auto_dtype(device)
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_pair(options: LoadOptions, with_draft: bool = True) -> LoadedPair:
    """Load a target and its draft; without the latter the pair drafts from n-grams.

    Raises:
        InvalidOption: an option that this machine cannot run; before anything is read.
        UnknownModel, WeightsCorrupt, UnsupportedModel, VocabularyMismatch: see `load` and `load_draft`.
    """
    device = resolve_device(options.device)
    in_file = options.quantize is None and keeps_weights(options.target)
    if not in_file and options.quantize is None and device.type == "cpu" and kernels.has_kernels():
        warn_of_unread_types(options.target)
    dtype = resolve_dtype(options.dtype, device, in_file)
    named, look_up = split_draft(options.draft)
    named = "ngram" if named is None and look_up else named
    draft = (default_draft(options.target) if named is None else named) if with_draft else "ngram"
    plan = plan_weights(device, dtype, Role.TARGET, options.quantize, in_file)
    for model in (options.target, "ngram" if named is None else draft):
        if model != "ngram":
            locate(model)
    if options.compile:
        warnings.warn("compile has no effect yet", McsdWarning, stacklevel=2)
    target = load(options.target, device, plan)
    try:
        return LoadedPair(target, load_draft(draft, target, options.quantize))
    except (UnknownModel, DownloadFailed) as error:
        if options.draft is not None:
            raise
        # The user asked for no draft: that the default one is missing is no reason to fail.
        warnings.warn(f"candidates are n-grams of the text: {error.message}", McsdWarning, stacklevel=3)
        return LoadedPair(target, "ngram")


def load(model: str | Path, device: torch.device, plan: WeightPlan, role: Role = Role.TARGET) -> LoadedModel:
    """Load a model for generation.

    Args:
        model: a name of the catalog, a folder, a GGUF file or a hub id.
        device: of its weights.
        plan: of its weights, from `plan_weights`.
        role: a draft may be cut to a draft vocabulary that its folder names.

    Raises:
        UnknownModel: no such model.
        WeightsCorrupt: its files cannot be read.
        UnsupportedModel: an architecture that the engine or transformers does not know.
        MissingPackage: the model needs a library that is not installed.
        OutOfMemory: the device does not have the memory for its weights.
    """
    location = locate(model)
    if location.kind == "target":
        raise UnknownModel(f"{model} is a draft, no target", "give it as the draft of a model that has such layers")
    in_file = None
    if location.kind == "gguf" and plan.format is WeightFormat.GGUF:
        in_file = read_gguf_network(location, plan.dtype)
        # A draft that only transformers can read is quantized as other drafts are.
        plan = plan if in_file or role is Role.DRAFT else plan_weights(device, plan.dtype, role)
    reference = partial(read_reference, model, plan)
    if in_file is not None:
        network, tokenizer = in_file
        in_four_bits = role is Role.DRAFT and round_to_int4(network, tokenizer, plan)
        precision = f"{plan}, in 4 bits" if in_four_bits else str(plan)
        loaded = LoadedModel(as_decoder(network, str(model), None, precision, reference), tokenizer, plan.format)
    else:
        cache = _gguf_cache(location, plan.dtype)
        read = partial(_read, model, location, device, plan.dtype, role, cache)
        loaded = _pack(read, str(model), plan, cache, reference)
    entry = entry_of(model)
    if entry and not model_defaults(loaded.model.generation_config):
        loaded.model.generation_config = GenerationConfig(**entry.sampling)
    return loaded


def optimize(network: Any, tokenizer: Any | None, role: Role) -> DecoderModel:
    """A fused and packed copy of a ``PreTrainedModel``, as `load` makes it of files. The model computes what it did.

    On a CPU the copy shares no weights with the model, so both are in memory: the copy in bfloat16 or int8. On a CUDA
    card it shares them, and its forwards are captured in CUDA graphs.

    Returns:
        A `DecoderModel`; where nothing can be packed it wraps the model itself, and a warning says why.
    """
    network = unwrap(network)
    plan = plan_weights(network.device, network.dtype, role)
    wrapped = TransformersModel(network)
    if network.device.type == "cuda":
        return as_decoder(fused_copy(network), wrapped.name, None, str(plan), lambda: network)
    if not plan.packed:
        if network.device.type != "cpu":
            reason = f"it is on {network.device.type}"
        elif network.dtype != torch.bfloat16:
            reason = f"its dtype is {str(network.dtype).removeprefix('torch.')}; load it with dtype='bfloat16'"
        else:
            reason = "this CPU has no fast bfloat16"
        warnings.warn(f"optimize has no effect on {wrapped.name}: {reason}", McsdWarning, stacklevel=4)
        return wrapped
    return _pack(lambda: (copy.deepcopy(network), tokenizer, None), wrapped.name, plan, None, lambda: network).model


def _pack(
    read: Callable[[], tuple[Any, Any | None, Tensor | None]],
    name: str,
    plan: WeightPlan,
    cache: GgufCache | None,
    load_reference: Callable[[], Any],
) -> LoadedModel:
    """A model packed as a plan says.

    Args:
        read: gives a network of its own, its tokenizer and its draft vocabulary.
        name: of the model.
        plan: of its weights.
        cache: may hold its int8 weights.
        load_reference: see `NativeDecoder`.
    """
    network, tokenizer, vocabulary = read()
    if plan.format is WeightFormat.W4A8 and not pack_int4(network, tokenizer, plan):
        del network, tokenizer  # Two of them may not fit into memory.
        network, tokenizer, vocabulary = read()
        plan = replace(plan, format=WeightFormat.W8A8)
    if plan.format in _INT8_WEIGHTS and cache:
        pack_from_int8_cache(network, plan, cache)
    elif plan.packed and plan.format is not WeightFormat.W4A8:
        pack(network, plan)
    elif network.device.type == "cuda":
        fuse_for_cuda(network)
    return LoadedModel(as_decoder(network, name, vocabulary, str(plan), load_reference), tokenizer, plan.format)


def load_draft(draft: str | Path, target: LoadedModel, quantize: str | None = None) -> Any:
    """Load a draft model or head for a target, on its device and in its dtype; "ngram" is returned as it is.

    Returns:
        A `DecoderModel`, a `TranslatedModel` if it has another tokenizer, a `BoundHead`, or "ngram".

    Raises:
        UnknownModel, WeightsCorrupt, UnsupportedModel: see `load`.
        VocabularyMismatch: it shares no token with the target.
    """
    if draft == "ngram":
        return draft
    head = load_head(draft, target.model)
    role = Role.DRAFT if head is None else Role.HEAD
    device, dtype = target.model.device, target.model.dtype
    in_file = quantize is None and keeps_weights(draft)
    plan = plan_weights(device, dtype, role, quantize, in_file, target.format)
    if head is not None:
        bound = bind_head(head, target.model, str(draft), plan)
        if bound.device.type == "cuda":
            fuse_for_cuda(bound.head)
        return bound
    loaded = load(draft, target.model.device, plan, Role.DRAFT)
    tokenizer = find_tokenizer(target.model.name) if target.tokenizer is None else target.tokenizer
    return match_tokenizers(target.model, tokenizer, loaded.model, loaded.tokenizer)


def read_transformers(model: str | Path, dtype: torch.dtype, device: torch.device = _CPU) -> tuple[Any, Any | None]:
    """A network as transformers runs it, on its device, and its tokenizer; None if there is none.

    Raises:
        UnknownModel, WeightsCorrupt, UnsupportedModel: see `load`.
    """
    location = locate(model)
    return _read_network(model, location, device, dtype, _gguf_cache(location, dtype))


def read_reference(model: str | Path, plan: WeightPlan) -> Any:
    """A network as transformers runs it, with the rounding of a plan; the reference of `mcsd verify`."""
    return quantize_reference(read_transformers(model, plan.dtype)[0], plan).eval()


def _gguf_cache(location: Location, dtype: torch.dtype) -> GgufCache | None:
    return GgufCache(Path(location.source) / location.file, dtype) if location.file else None


def _read(
    model: str | Path, location: Location, device: torch.device, dtype: torch.dtype, role: Role, cache: GgufCache | None
) -> tuple[Any, Any | None, Tensor | None]:
    """A network on its device, its tokenizer, and its draft vocabulary, if it has one."""
    network, tokenizer = _read_converted(cache, device) or _read_network(model, location, device, dtype, cache)
    vocabulary = None
    if role is Role.DRAFT and location.kind == "folder":
        vocabulary = load_vocabulary(Path(location.source), network.config.get_text_config().vocab_size)
    if vocabulary is not None:
        vocabulary = vocabulary.to(device)
        cut_vocabulary(network, vocabulary)
    return network, tokenizer, vocabulary


def _read_converted(cache: GgufCache | None, device: torch.device) -> tuple[Any, Any | None] | None:
    """Network and tokenizer of the cached copy of a GGUF file; None if transformers must read it."""
    if cache and cache.is_current():
        try:
            return read_converted(cache, device)
        except WeightsCorrupt:
            cache.delete()
    return None


def _read_network(
    model: str | Path, location: Location, device: torch.device, dtype: torch.dtype, cache: GgufCache | None
) -> tuple[Any, Any | None]:
    """Network and tokenizer; of a GGUF file from its cached copy, which the first load writes."""
    if cache and cache.is_current():
        try:
            return read_location(model, Location("folder", str(cache.folder)), dtype, device)
        except ModelError:
            cache.delete()
    if cache is None:
        return read_location(model, location, dtype, device)
    # The copy is written from CPU memory, where transformers dequantizes a GGUF file.
    network, tokenizer = read_location(model, location, dtype, _CPU)
    cache.write(network, tokenizer)
    try:
        return network.to(device), tokenizer
    except torch.OutOfMemoryError as error:
        raise weights_too_large(model, device) from error
