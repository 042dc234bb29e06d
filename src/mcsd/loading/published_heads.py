"""Draft heads from folders and hub ids: those of mcsd, and EAGLE heads in the formats that they are published in.

* SafeAILab and SpecForge: the fields of a Llama in ``config.json``, with an architecture of EAGLE-3 in it or, for
  EAGLE-1 and 2, a tensor ``fc.weight`` in the weights.
* speculators: ``speculators_model_type``, and the fields of the decoder layers in ``transformer_layer_config``.

A head that mcsd would compute otherwise than it was trained is refused by name.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mcsd.errors import UnsupportedModel, WeightsCorrupt, one_line
from mcsd.loading.catalog import MTP, PICKLES, locate
from mcsd.loading.mtp_head import load_mtp_head
from mcsd.loading.pretrained import hub_answers, read_fields
from mcsd.models.draft_head import CONFIG_FILE, HEAD_TYPE, MAX_POSITIONS, WEIGHTS_FILE, DraftHead, HeadConfig
from mcsd.models.llama import LlamaConfig
from mcsd.models.protocol import DecoderModel

_EAGLE3 = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"}
_EAGLE = {"EagleLlamaForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"}
"""Architectures by ``config.json``; EAGLE-1 and 2 name that of their layer."""

_WEIGHTS = "*.safetensors"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")

_LAYER_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers"),
)
"""Fields of a configuration of transformers from which sizes are read."""

_LAYER_TYPE = "qwen3"
"""Model type of layers that name none, in the format of speculators."""

_SIZES = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    1 << 22,
) | {"num_hidden_layers": 64}
"""Limits of fields, before transformers makes lists and tables of such sizes."""

_CONSTANT_ROPES = {"linear", "llama3", "yarn"}
"""Kinds of rotary embeddings, besides the default, whose frequencies do not depend on the text."""

_MODULES = {
    "midlayer.": "decoder.layers.0.",
    "layers.": "decoder.layers.",
    "input_norm.": "feature_norm.",
    "embed_tokens.": "embed_tokens.",
    "lm_head.": "lm_head.",
}
"""Beginnings of tensor names in files, and in `DraftHead`. Other names depend on the kind of head."""

_UNUSED = {"t2d", "verifier_lm_head.weight", "verifier_norm.weight"}
"""Tensors that training needs only."""

_ERRORS = (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What Python, torch, transformers and safetensors raise for broken files."""

_FETCH_AGAIN = "fetch the head again"
_OTHER_DRAFT = "use an EAGLE-3 head, a draft model, or ngram"


def is_head(draft: str | Path) -> bool:
    """Whether a draft is a draft head rather than a language model.

    Raises:
        UnknownModel: no such draft.
        UnsupportedModel: a head whose weights are not in safetensors.
    """
    return draft == MTP or _head_folder(draft) is not None


def load_head(draft: str | Path, target: DecoderModel) -> DraftHead | None:
    """Load a draft head for a target, or the target's own ("mtp"). Binding it checks whether their sizes fit.

    Returns:
        None: the draft is a language model.

    Raises:
        UnknownModel: no such draft.
        UnsupportedModel: a head that mcsd would not compute exactly, or whose weights are not in safetensors.
        WeightsCorrupt: its files cannot be read, or do not belong together.
    """
    if draft == MTP:
        return load_mtp_head(target)
    folder, name = _head_folder(draft), str(draft)
    if folder is None:
        return None
    fields = read_fields(folder / CONFIG_FILE)
    if fields.get("model_type") == HEAD_TYPE:
        return DraftHead.load(folder)
    try:
        if not fields:
            raise ValueError(f"{CONFIG_FILE} is no JSON object")
        tensors = _tensors(folder)
        return _assembled(_config(fields, tensors, target, name), tensors)
    except _ERRORS as error:
        raise WeightsCorrupt(f"draft head {name} cannot be read: {one_line(error):.200}", _FETCH_AGAIN) from error


def _head_folder(draft: str | Path) -> Path | None:
    """The folder of a draft head, fetched from the hub if need be; None: the draft is no head."""
    location = locate(draft)
    if location.kind in ("gguf", "target"):
        return None
    on_hub = location.kind == "hub"
    offline = on_hub and not hub_answers()
    folder = _fetched(location.source, [CONFIG_FILE], offline) if on_hub else Path(location.source)
    config = read_fields(folder / CONFIG_FILE) if folder else {}
    is_certain = config.get("model_type") == HEAD_TYPE or _says_head(config)
    # EAGLE-1 and 2 call themselves models, mostly of one layer: only their tensors tell.
    is_small = config.get("num_hidden_layers") == 1
    if on_hub:
        folder = _fetched(location.source, [CONFIG_FILE, _WEIGHTS], offline) if is_certain or is_small else None
    if folder is None:
        return None
    if not _weight_files(folder) and config.get("model_type") != HEAD_TYPE:
        if is_certain or (is_small and any(file.suffix in PICKLES for file in folder.iterdir())):
            raise UnsupportedModel(
                f"{draft} has no {_WEIGHTS} files; pickle files (pytorch_model.bin) can run code and are not read",
                "convert it: safetensors.torch.save_file(torch.load('pytorch_model.bin', weights_only=True),"
                " 'model.safetensors')",
            )
        return None
    return folder if is_certain or "fc.weight" in _tensor_names(folder) else None


def _says_head(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says that it is one of a head."""
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return "speculators_model_type" in config or any("eagle" in str(name).lower() for name in named)


def _fetched(name: str, patterns: Collection[str], offline: bool) -> Path | None:
    """The folder of a hub id with some of its files; None if it cannot be had: loading it as a model says why."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=offline))
    except Exception:  # The HTTP library and its errors differ between versions of the hub's client.
        return None


def _weight_files(folder: Path) -> list[Path]:
    """The weights in a folder: one file, or all of which it is made."""
    whole = folder / WEIGHTS_FILE
    return [whole] if whole.exists() else sorted(folder.glob(_WEIGHTS))


def _tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder; none of a file that is broken: loading it says what is wrong with it."""
    names: set[str] = set()
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                names |= set(opened.keys())
        except (OSError, SafetensorError):
            continue
    return names


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder.

    Raises:
        ValueError: a file is missing, or a tensor is in two of them.
        OSError, SafetensorError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    files = _weight_files(folder)
    counts = [int(match[1]) for file in files if (match := _SHARD.search(file.name))]
    if any(count != len(counts) for count in counts):
        raise ValueError(f"of {max(counts)} files there are {len(counts)}")
    for file in files:
        part = load_file(file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"{twice[0]!r:.80} is in two files")
        tensors |= part
    return tensors


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], target: DecoderModel, name: str) -> HeadConfig:
    """The configuration of a published head.

    Raises:
        UnsupportedModel: mcsd would not compute it exactly.
        ValueError, ArithmeticError, KeyError, TypeError, AttributeError: it is broken.
    """
    kind: Any = fields.get("speculators_model_type")
    default: Any = fields.get("vocab_size")
    if kind is not None:
        if kind != "eagle3":
            raise _refused(name, _REASONS.get(kind, f"is a speculator of the kind {kind!r:.40}"))
        layer = fields.get("transformer_layer_config")
        if not isinstance(layer, dict):
            raise ValueError("transformer_layer_config is no object")
        verifier = (fields.get("speculators_config") or {}).get("verifier") or {}
        belongs, model_types = verifier.get("name_or_path"), {"llama", "qwen3"}
        layers, default = fields.get("eagle_aux_hidden_state_layer_ids"), 32000
    else:
        named = set(fields.get("architectures") or ())
        kind = "eagle3" if named & _EAGLE3 or "d2t" in tensors else "eagle"
        if not named <= _EAGLE3 | _EAGLE:
            raise _refused(name, f"has the architecture {', '.join(sorted(map(str, named)))!r:.80}")
        layer, belongs = dict(fields), None
        model_types = {"llama"} if kind == "eagle3" else {"llama", "qwen2"}
        layers = fields.get("eagle_aux_hidden_state_layer_ids") or _outputs_as_inputs(fields, name)
        if any(key.startswith("midlayer.") for key in tensors):
            # The field may be the target's.
            layer["num_hidden_layers"] = 1
    if fields.get("quantization_config") or layer.get("quantization_config"):
        raise _refused(name, "has quantized weights")
    decoder = _layer_config(layer, model_types, tensors, name)
    if _flag(fields, "fc_norm") and _flag(fields, "norm_before_fc"):
        raise ValueError("fc_norm and norm_before_fc exclude each other")
    flags = {key: _flag(fields, key) for key in ("norm_before_residual", "norm_output")}
    count = target.num_layers
    return HeadConfig(
        target=f"{belongs!r:.80}" if belongs else f"a target of {decoder.vocab_size} tokens",
        target_vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        hidden_layers=(-1,) if kind == "eagle" else tuple(layers or (2, count // 2, count - 3)),
        num_layers=decoder.num_hidden_layers,
        vocab_size=decoder.vocab_size if kind == "eagle" else fields.get("draft_vocab_size") or default,
        kind=kind,
        layer=decoder,
        layer_fields={"model_type": _LAYER_TYPE}
        | {key: layer[key] for key in ("model_type", *_LAYER_FIELDS) if key in layer},
        target_hidden_size=fields.get("target_hidden_size") if kind == "eagle3" else None,
        own_embeddings="embed_tokens.weight" in tensors,
        input_bias=_flag(fields, "bias", "fc.bias" in tensors),
        feature_norm="each" if _flag(fields, "fc_norm") else "all" if _flag(fields, "norm_before_fc") else "none",
        **flags,
    )


_REASONS = {
    "peagle": "predicts several positions at once, without the candidates between them",
    "mtp": "is a layer of multi-token prediction",
}
"""Why speculators of some kinds are refused."""


def _flag(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.40} is not true or false")
    return default if value is None else value


def _outputs_as_inputs(fields: Mapping[str, Any], name: str) -> list[int] | None:
    """The layers that SpecForge names by their outputs, as those whose inputs are the same."""
    eagle = fields.get("eagle_config") or {}
    if not _flag(eagle, "use_aux_hidden_state", True):
        raise _refused(name, "reads the last hidden states only, in the format of EAGLE-3")
    layers = eagle.get("eagle_aux_hidden_state_layer_ids")
    return [layer + 1 for layer in layers] if layers else None


def _layer_config(
    fields: Mapping[str, Any], model_types: Collection[str], tensors: Mapping[str, Tensor], name: str
) -> LlamaConfig:
    """The sizes of the decoder layers; transformers knows the defaults of fields that are left out."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model_type = fields.get("model_type", _LAYER_TYPE)
    if model_type not in model_types:
        raise _refused(name, f"has layers of the kind {model_type!r:.40}")
    for key, limit in _SIZES.items():
        size = fields.get(key)
        if size is not None and (type(size) is not int or not 1 <= size <= limit):
            raise ValueError(f"{key}={size!r:.40} is not an integer from 1 to {limit}")
    try:
        config: Any = AutoConfig.for_model(model_type, **{key: fields[key] for key in _LAYER_FIELDS if key in fields})
    except Exception as error:  # Its checks raise errors of several types.
        raise ValueError(f"its configuration is broken: {one_line(error):.150}") from error
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if config.hidden_act != "silu":
        raise _refused(name, f"has the activation {config.hidden_act!r:.40}")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise _refused(name, "has layers with a sliding window")
    if any(isinstance(part, dict) for part in rope.values()):
        raise _refused(name, "has rotary embeddings that differ between layers")
    if kind not in _CONSTANT_ROPES | {"default"} or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(name, f"has rotary embeddings of the kind {kind!r:.40}")
    frequencies, scale = None, 1.0
    if kind != "default":
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        frequencies = tuple(inverse.tolist())
    biased = bool(getattr(config, "attention_bias", False))
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        qkv_bias=biased or "layers.0.self_attn.q_proj.bias" in tensors,
        output_bias=biased,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        frequencies=frequencies,
        rope_scale=float(scale),
    )


def _refused(name: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"draft {name} {reason}, which mcsd does not run", _OTHER_DRAFT)


def _assembled(config: HeadConfig, tensors: Mapping[str, Tensor]) -> DraftHead:
    """A head with the tensors of its files, which are not copied.

    Raises:
        ValueError: tensors are missing, unknown, misshapen or not finite, or d2t is no map.
    """
    state = {_renamed(key, config): tensor for key, tensor in tensors.items() if not _is_unused(key)}
    if config.feature_norm == "all" and "feature_norm.weight" in state:
        state["feature_norm.weight"] = state["feature_norm.weight"][None]
    norms = [key for key in (f"fc_norm.{part}.weight" for part in range(len(config.hidden_layers))) if key in state]
    if config.feature_norm == "each" and len(norms) == len(config.hidden_layers):
        state["feature_norm.weight"] = torch.stack([state.pop(key) for key in norms])
    state["vocabulary"] = _vocabulary(state.pop("d2t", None), config)
    return DraftHead.from_tensors(config, state)


def _is_unused(key: str) -> bool:
    return key in _UNUSED or key.endswith("rotary_emb.inv_freq")


def _renamed(key: str, config: HeadConfig) -> str:
    """The name in `DraftHead` of a tensor."""
    modules = _MODULES | {
        "fc.": "feature_proj." if config.kind == "eagle3" else "input_proj.",
        "norm.": "decoder.norm." if config.norm_output else "output_norm.",
    }
    return next((new + key.removeprefix(old) for old, new in modules.items() if key.startswith(old)), key)


def _vocabulary(d2t: Tensor | None, config: HeadConfig) -> Tensor:
    """int32 ``[K]``, the token of each logit: its index plus ``d2t``."""
    size = config.target_vocab_size
    if d2t is None:
        if config.vocab_size != size:
            raise ValueError(f"d2t, the tokens of its {config.vocab_size} logits, is missing")
        return torch.arange(size, dtype=torch.int32)
    if d2t.shape != (config.vocab_size,) or d2t.dtype not in (torch.int32, torch.int64):
        dtype = str(d2t.dtype).removeprefix("torch.")
        raise ValueError(f"d2t is {dtype} {list(d2t.shape)}, not int64 {[config.vocab_size]}")
    ids = torch.arange(config.vocab_size) + d2t
    if not ((ids >= 0) & (ids < size)).all():
        raise ValueError(f"d2t names tokens outside of a vocabulary of {size}")
    return ids.to(torch.int32)
