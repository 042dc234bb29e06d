"""Reading networks and tokenizers with transformers, and what its errors mean for the user."""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mcsd.errors import McsdError, MissingPackage, OutOfMemory, UnknownModel, UnsupportedModel, WeightsCorrupt
from mcsd.loading.catalog import Location

_FETCH_AGAIN = "fetch the weights again; safetensors and GGUF files are read"
_HUB_SECONDS = 5
_ADAPTER_FILE = "adapter_config.json"


def read_location(
    model: str | Path, location: Location, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any | None]:
    """A ``PreTrainedModel`` and its tokenizer; None if there is none.

    Args:
        model: as the user named it.
        location: where it is.
        dtype, device: of the weights, which go straight to the device.

    Raises:
        UnknownModel, WeightsCorrupt, UnsupportedModel, OutOfMemory: see `mcsd.loading.load.load`.
        MissingPackage: quantized weights, or an adapter beside them, need a library that is not installed.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    if location.kind == "gguf":
        options |= {"gguf_file": location.file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options["use_safetensors"] = True
    if device.type != "cpu":
        options["device_map"] = {"": device}
    offline = location.kind == "hub" and not _hub_answers()
    options["local_files_only"] = offline
    _check_adapter(model, location)
    try:
        network, report = AutoModelForCausalLM.from_pretrained(location.source, **options)
    except MemoryError:
        raise
    except ImportError as error:
        raise MissingPackage(f"{model}: {_reason(error):.200}", "install the package that it names") from error
    except torch.OutOfMemoryError as error:
        raise weights_too_large(model, device) from error
    except Exception as error:
        raise _explained(model, location, error, offline) from error
    # transformers fills missing tensors with random numbers.
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise WeightsCorrupt(f"{model}: {len(missing)} tensors are missing or misshapen: {missing[0]}", _FETCH_AGAIN)
    return network, read_tokenizer(location, offline)


def _hub_answers() -> bool:
    """Whether the hub can be reached: transformers takes half a minute of retries to find out that it cannot."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # The HTTP library and its errors differ between versions of the hub's client.
        return False
    return True


def _check_adapter(model: str | Path, location: Location) -> None:
    """transformers ignores an adapter if its library is missing; the text would be another model's."""
    has_adapter = location.kind == "folder" and (Path(location.source) / _ADAPTER_FILE).exists()
    if has_adapter and importlib.util.find_spec("peft") is None:
        raise MissingPackage(f"{model} has an adapter ({_ADAPTER_FILE}), which needs peft", "pip install peft")


def _explained(model: str | Path, location: Location, error: Exception, offline: bool) -> McsdError:
    """The error of mcsd for an exception of transformers, gguf or safetensors, which may be of any type."""
    reason = _reason(error)
    what = f"{model}: {reason:.200}"
    if "not supported" in reason or "does not recognize this architecture" in reason or "Unrecognized" in reason:
        return UnsupportedModel(what, "choose a decoder-only model that transformers supports")
    if location.kind == "hub":
        if offline:
            what = f"{model} is not in the local cache of the hub, and the hub cannot be reached"
        return UnknownModel(
            what, "check the id and the network, or give a folder or GGUF file; `mcsd models` lists names"
        )
    return WeightsCorrupt(what, _FETCH_AGAIN)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def weights_too_large(model: str | Path, device: torch.device) -> OutOfMemory:
    """The error for weights that a device has no memory for."""
    return OutOfMemory(
        f"{model}: the weights do not fit into the memory of {device}",
        "choose a smaller model, float16 or bfloat16, or another device",
    )


def read_tokenizer(location: Location, offline: bool = False) -> Any | None:
    """The tokenizer at a location; None if there is none.

    Args:
        location: where it is.
        offline: whether a hub id is read from the local cache of the hub only.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer_class: Any = PreTrainedTokenizerFast
    options = {"gguf_file": location.file} if location.kind == "gguf" else {}
    # AutoTokenizer imports the configurations of all models; a tokenizer without a class of its own needs none.
    if location.kind != "folder" or _tokenizer_class(Path(location.source)) != tokenizer_class.__name__:
        from transformers import AutoTokenizer

        tokenizer_class = AutoTokenizer
    try:
        return tokenizer_class.from_pretrained(
            location.source, trust_remote_code=False, local_files_only=offline, **options
        )
    except (OSError, ValueError, KeyError):
        # Weights without a tokenizer serve requests given as token ids.
        return None


@lru_cache(maxsize=8)
def find_tokenizer(name: str) -> Any | None:
    """The tokenizer of a folder, or of a hub id in the local cache of the hub; None if it has none."""
    try:
        return (
            read_tokenizer(Location("folder" if Path(name).is_dir() else "hub", name), offline=True) if name else None
        )
    except Exception:  # Nobody has asked for it: a file that cannot be read is no tokenizer.
        return None


def _tokenizer_class(folder: Path) -> str | None:
    """The class of a tokenizer by its configuration; None if there is none."""
    try:
        fields = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return fields.get("tokenizer_class") if isinstance(fields, dict) else None
