"""From a name, folder, GGUF file or hub id to a model and its tokenizer. Safetensors and GGUF only, no remote code."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsd import kernels
from mcsd.catalog import Location, locate
from mcsd.errors import InvalidOption, McsdError, UnknownModel, UnsupportedModel, WeightsCorrupt
from mcsd.models.coarse import pack_coarsely
from mcsd.models.compatibility import check_tokenizers
from mcsd.models.compilation import compile_layers
from mcsd.models.converted import Conversion
from mcsd.models.head import CONFIG, HEAD_TYPE, BoundHead, DraftHead
from mcsd.models.packing import layer_for, pack, packable, rounds
from mcsd.models.quantization import check_quantize
from mcsd.models.rounded import pack_rounded
from mcsd.models.transformers import TransformersModel
from mcsd.models.trimming import load_vocabulary, trim

_AGAIN = "fetch the weights again; safetensors and GGUF files are read"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer; None if there is none beside the weights."""

    model: TransformersModel
    tokenizer: Any | None


def choose_device(device: str) -> torch.device:
    """``auto``: CUDA where there is one, else the CPU.

    Raises:
        InvalidOption: no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidOption(f"device {device!r:.40} cannot be used here", "auto, cpu, cuda or cuda:N") from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the hardware has it, else float32.

    Raises:
        InvalidOption: no such dtype.
    """
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else packable(device, torch.bfloat16)
        return torch.bfloat16 if native else torch.float32
    if dtype not in DTYPES:
        raise InvalidOption(f"dtype {dtype!r:.40} is unknown", f"one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load(
    model: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    draft: bool = False,
    quantize: str | None = None,
    compile: bool = False,
) -> Loaded:
    """Load a model for generation.

    Args:
        model: a name of the catalogue, a folder, a GGUF file or a hub id.
        device: where to.
        dtype: of the weights; bfloat16 on a CPU is packed for its kernels.
        draft: whether it is to draft: then it may be trimmed to the tokens that its folder names, and rounded further.
        quantize: a name in `mcsd.models.quantization.QUANTIZATIONS`, of which the machine is capable.
        compile: whether to compile it, where that can be done: see `mcsd.models.compilation`.

    Raises:
        UnknownModel: nothing is there.
        WeightsCorrupt: something is there and cannot be read.
        UnsupportedModel: an architecture that the engine or transformers does not know.
    """
    location = locate(model)
    copy = _copy_of(location, dtype)
    read_in = partial(_read_and_trim, model, location, device, dtype, draft, copy)
    network, tokenizer, vocabulary = read_in()
    layer = layer_for(device, dtype, draft, quantize)
    rounded = rounds(device, dtype, draft, quantize)
    # A draft reads all its weights for a token or two, so its time is theirs; coarser ones change q only. A head is as
    # `layer_for` has it: most are so small that they stay in the processor's cache.
    coarse = draft and rounded and kernels.available()
    if coarse and not pack_coarsely(network, tokenizer):
        del network, tokenizer  # Two of them may be too much for the memory.
        network, tokenizer, vocabulary = read_in()
        coarse = False
    if not coarse:
        if copy and rounded:
            pack_rounded(network, not draft, copy)
        elif layer:
            pack(network, layer)
    loaded = TransformersModel(network, str(model), vocabulary)
    if compile:
        compile_layers(loaded)
    return Loaded(loaded, tokenizer)


def read(model: str | Path, dtype: torch.dtype) -> tuple[Any, Any | None]:
    """A network as transformers itself has it, and its tokenizer; None if there is none.

    Raises:
        UnknownModel, WeightsCorrupt, UnsupportedModel: as `load`.
    """
    location = locate(model)
    return _network(model, location, dtype, _copy_of(location, dtype))


def load_pair(
    target: str | Path, draft: str | Path, device: str, dtype: str, quantize: str | None, compile: bool
) -> tuple[Loaded, Any]:
    """Load a target and what drafts for it.

    Args:
        target, draft: as `load` takes them; the draft may be "ngram", which is handed on as it is.
        device, dtype, quantize, compile: as `mcsd.Engine.load` takes them.

    Raises:
        InvalidOption: an option that cannot be, here or at all; before anything is read.
        UnknownModel, WeightsCorrupt, UnsupportedModel, VocabularyMismatch: see `load` and `load_draft`.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    check_quantize(quantize, where)
    for model in (target, draft):
        if model != "ngram":
            locate(model)
    loaded = load(target, where, kind, quantize=quantize, compile=compile)
    return loaded, draft if draft == "ngram" else load_draft(draft, loaded, quantize, compile)


def load_draft(
    draft: str | Path, target: Loaded, quantize: str | None = None, compile: bool = False
) -> TransformersModel | BoundHead:
    """Load what drafts for a target, in its dtype and where it is; a head is too little to compile.

    Raises:
        UnknownModel, WeightsCorrupt, UnsupportedModel: as `load`.
        VocabularyMismatch: it does not share the target's tokens.
    """
    if is_head(draft):
        return load_head(draft, target.model, quantize)
    loaded = load(draft, target.model.device, target.model.network.dtype, True, quantize, compile)
    check_tokenizers(target.model, target.tokenizer, loaded.model, loaded.tokenizer)
    return loaded.model


def is_head(draft: str | Path) -> bool:
    """Whether a draft is a head rather than a language model.

    Raises:
        UnknownModel: nothing is there.
    """
    location = locate(draft)
    if location.kind != "folder":
        return False
    try:
        config = json.loads((Path(location.source) / CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False  # Whoever loads it as a model says what is wrong with it.
    return isinstance(config, dict) and config.get("model_type") == HEAD_TYPE


def load_head(draft: str | Path, target: TransformersModel, quantize: str | None = None) -> BoundHead:
    """Load a head for its target.

    Raises:
        UnknownModel, WeightsCorrupt, VocabularyMismatch, UnsupportedModel: it is not there, cannot be read, or belongs
            to another target.
    """
    return BoundHead(DraftHead.load(Path(locate(draft).source)), target, str(draft), quantize)


def _copy_of(location: Location, dtype: torch.dtype) -> Conversion | None:
    """The copy of a GGUF file, which may or may not be there; None for all else."""
    return Conversion(Path(location.source) / location.file, dtype) if location.file else None


def _network(
    model: str | Path, location: Location, dtype: torch.dtype, copy: Conversion | None
) -> tuple[Any, Any | None]:
    return _read_gguf(model, location, dtype, copy) if copy else _read(model, location, dtype)


def _read_and_trim(
    model: str | Path,
    location: Location,
    device: torch.device,
    dtype: torch.dtype,
    draft: bool,
    copy: Conversion | None,
) -> tuple[Any, Any | None, Tensor | None]:
    """A network where it is to run, its tokenizer, and the tokens that it is trimmed to, None if it is not."""
    network, tokenizer = _network(model, location, dtype, copy)
    network = network.to(device)
    vocabulary = None
    if draft and location.kind == "folder":
        vocabulary = load_vocabulary(Path(location.source), network.config.get_text_config().vocab_size)
    if vocabulary is not None:
        vocabulary = vocabulary.to(device)
        trim(network, vocabulary)
    return network, tokenizer, vocabulary


def _read_gguf(model: str | Path, location: Location, dtype: torch.dtype, copy: Conversion) -> tuple[Any, Any | None]:
    """Network and tokenizer of a GGUF file, or of the copy that an earlier load has made of it."""
    if copy.there():
        try:
            return _read(model, Location("folder", str(copy.folder)), dtype)
        except McsdError:
            copy.drop()
    network, tokenizer = _read(model, location, dtype)
    copy.keep(network, tokenizer)
    return network, tokenizer


def _read(model: str | Path, location: Location, dtype: torch.dtype) -> tuple[Any, Any | None]:
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    if location.kind == "gguf":
        options |= {"gguf_file": location.file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options["use_safetensors"] = True
    try:
        network, report = AutoModelForCausalLM.from_pretrained(location.source, **options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise _explained(model, location, error) from error
    # transformers fills what a file lacks with random numbers.
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:
        raise WeightsCorrupt(f"{model}: {len(lacking)} tensors are missing or misshapen, {lacking[0]} first", _AGAIN)
    return network, _tokenizer(location)


def _explained(model: str | Path, location: Location, error: Exception) -> McsdError:
    """transformers, gguf and safetensors raise whatever comes up; this names what it means for the user."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    what = f"{model}: {reason:.200}"
    if "not supported" in reason or "does not recognize this architecture" in reason or "Unrecognized" in reason:
        return UnsupportedModel(what, "choose a decoder-only model that transformers supports")
    if location.kind == "hub":
        return UnknownModel(
            what, "check the id and the network, or give a folder or GGUF file; `mcsd models` lists names"
        )
    return WeightsCorrupt(what, _AGAIN)


def _tokenizer(location: Location) -> Any | None:
    from transformers import AutoTokenizer

    options = {"gguf_file": location.file} if location.kind == "gguf" else {}
    try:
        return AutoTokenizer.from_pretrained(location.source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError):
        # Weights without a tokenizer still serve requests given as token ids.
        return None
