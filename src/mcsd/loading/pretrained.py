"""Reading networks and tokenizers with transformers, and what its errors mean for the user."""

import importlib.util
import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mcsd.errors import (
    McsdError,
    McsdWarning,
    MissingPackage,
    OutOfMemory,
    UnknownModel,
    UnsupportedModel,
    WeightsCorrupt,
)
from mcsd.loading.catalog import ADAPTER_FILE, Location
from mcsd.system import collector_paused

_FETCH_AGAIN = "fetch the weights again; safetensors and GGUF files are read"
_HUB_SECONDS = 5
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_QUANTIZATION_PACKAGES = {
    "aqlm": "aqlm[cpu]",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""What transformers needs to read quantized weights, by the method in their configuration."""


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
        MissingPackage: quantized weights, or an adapter, need a library that is not installed.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    if location.kind == "gguf":
        options |= {"gguf_file": location.file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options["use_safetensors"] = True
    if device.type != "cpu":
        options["device_map"] = {"": device}
    base, method = _adapter_base(model, location), _check_quantization(model, location)
    offline = (location.kind if base is None else base.kind) == "hub" and not hub_answers()
    options["local_files_only"] = offline
    try:
        network, report = AutoModelForCausalLM.from_pretrained(location.source, **options)
    except MemoryError:
        raise
    except ImportError as error:
        raise _missing_package(model, method, _reason(error)) from error
    except torch.OutOfMemoryError as error:
        raise weights_too_large(model, device) from error
    except Exception as error:
        raise _explained(model, base or location, error, offline) from error
    # transformers fills missing tensors with random numbers.
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise WeightsCorrupt(f"{model}: {len(missing)} tensors are missing or misshapen: {missing[0]}", _FETCH_AGAIN)
    if getattr(network, "peft_config", None):
        warnings.warn(
            f"{model}: the adapter stays beside the weights, which is slower: to merge it, save"
            " AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()",
            McsdWarning,
            stacklevel=2,
        )
    tokenizer = read_tokenizer(location, offline)
    return network, read_tokenizer(base, offline) if tokenizer is None and base else tokenizer


def read_config(location: Location) -> Any:
    """The configuration of a GGUF file as transformers has it.

    Raises:
        WeightsCorrupt, UnsupportedModel: see `mcsd.loading.load.load`.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location.source, gguf_file=location.file)
    except Exception as error:
        raise _explained(location.file or "", location, error, offline=False) from error


def hub_answers() -> bool:
    """Whether the hub can be reached: transformers takes half a minute of retries to find out that it cannot."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # The HTTP library and its errors differ between versions of the hub's client.
        return False
    return True


def _adapter_base(model: str | Path, location: Location) -> Location | None:
    """Where the model is that a folder's adapter belongs to; None if there is no adapter.

    Raises:
        MissingPackage: without peft transformers ignores an adapter; the text would be another model's.
        WeightsCorrupt: the adapter is not in safetensors, or its configuration is broken.
    """
    folder = Path(location.source)
    if location.kind != "folder" or not (folder / ADAPTER_FILE).exists():
        return None
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage(f"{model} has an adapter ({ADAPTER_FILE}), which needs peft", "pip install peft")
    if not (folder / _ADAPTER_WEIGHTS).exists():
        raise WeightsCorrupt(
            f"{model} has an adapter without {_ADAPTER_WEIGHTS}", "save it with safetensors; pickle files are not read"
        )
    if (folder / "config.json").exists():
        return location
    base = read_fields(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightsCorrupt(f"{model}: {ADAPTER_FILE} names no model", "give base_model_name_or_path in it")
    return Location("folder" if Path(base).is_dir() else "hub", base)


def _check_quantization(model: str | Path, location: Location) -> str | None:
    """The method by which the weights in a folder are quantized; None if they are not.

    Raises:
        UnsupportedModel: transformers does not know it, and would read the weights as if they were plain.
    """
    quantization = read_fields(Path(location.source) / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if location.kind == "folder" and isinstance(quantization, dict) else None
    if not isinstance(method, str):
        return None  # A broken configuration fails when it is read.
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method != "bitsandbytes" and method not in AUTO_QUANTIZER_MAPPING:
        raise UnsupportedModel(
            f"{model} is quantized by the method {method!r:.40}, which transformers does not know",
            "give weights that are not quantized, or a GGUF file",
        )
    return method


def _missing_package(model: str | Path, method: str | None, reason: str) -> McsdError:
    """The error for a library that transformers does not find."""
    if "GPU" in reason:
        return UnsupportedModel(f"{model}: {reason:.200}", "give weights that are not quantized, or a GGUF file")
    package = _QUANTIZATION_PACKAGES.get(method or "")
    what = f"{model} is quantized ({method})" if method else str(model)
    return MissingPackage(
        f"{what}: {reason:.200}", f"pip install {package}" if package else "install the package that it names"
    )


def _explained(model: str | Path, location: Location, error: Exception, offline: bool) -> McsdError:
    """The error of mcsd for an exception of transformers, gguf or safetensors, which may be of any type."""
    reason = _reason(error)
    what = f"{model}: {reason:.200}"
    if "only supported on GPU" in reason:
        return UnsupportedModel(what, "give weights that are not quantized, or a GGUF file")
    if "custom code" in reason:
        return UnsupportedModel(
            f"{model} needs code of its own, which mcsd does not run", "choose a model that transformers has itself"
        )
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

    Raises:
        WeightsCorrupt: there is one, and it cannot be read.
        MissingPackage: it needs a library that is not installed.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer_class: Any = PreTrainedTokenizerFast
    options = {"gguf_file": location.file} if location.kind == "gguf" else {}
    # AutoTokenizer imports the configurations of all models; a tokenizer without a class of its own needs none.
    if location.kind != "folder" or _tokenizer_class(Path(location.source)) != tokenizer_class.__name__:
        from transformers import AutoTokenizer

        tokenizer_class = AutoTokenizer
    try:
        with collector_paused():
            return tokenizer_class.from_pretrained(
                location.source, trust_remote_code=False, local_files_only=offline, **options
            )
    except ImportError as error:
        raise MissingPackage(
            f"{location.source}: {_reason(error):.200}", "install the package that it names"
        ) from error
    except Exception as error:  # Libraries raise errors of any type for a broken file.
        if isinstance(error, (OSError, ValueError, KeyError)) and not _has_vocabulary(location):
            # Weights without a tokenizer serve requests given as token ids.
            return None
        raise WeightsCorrupt(
            f"{location.source}: the tokenizer cannot be read: {_reason(error):.200}",
            "fetch it again, or remove its files to give token ids",
        ) from error


def _has_vocabulary(location: Location) -> bool:
    """Whether a folder has the file of a tokenizer's vocabulary."""
    names = ("tokenizer.*", "vocab.*", "*.tiktoken", "spiece.model")
    return location.kind == "folder" and any(path for name in names for path in Path(location.source).glob(name))


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
    return read_fields(folder / "tokenizer_config.json").get("tokenizer_class")


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if it cannot be read."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
