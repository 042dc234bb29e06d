"""The sampling parameters of a request, from those that the user gives and the defaults of the model.

Keyword arguments and dicts replace single fields of the model's defaults. `SamplingParams` and generation configs count
whole. Constraints of the model's generation config hold either way (`mcsd.processors`).
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mcsd.errors import InvalidParameter, McsdWarning
from mcsd.generation_config import generate_fields, is_generation_config, sampling_fields, unsupported_fields
from mcsd.params import SamplingParams, check_names

_ALWAYS_USED = ("bad_words", "min_new_tokens")
"""Defaults of a model that hold for explicit `SamplingParams` too."""


def combine(defaults: SamplingParams, params: Any, fields: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters of a request.

    Args:
        defaults: those of the model.
        params: `SamplingParams` or a ``GenerationConfig``, which count whole; a dict, whose fields replace those of the
            defaults; None.
        fields: keyword arguments, which replace fields of the defaults.

    Raises:
        InvalidParameter: an unknown name, a value outside its range, or both ``params`` and ``fields``.
    """
    if params is not None and fields:
        raise InvalidParameter(
            f"sampling parameters are given as an object and as {next(iter(fields))}=...",
            "give one of them, or dataclasses.replace(params, ...)",
        )
    if isinstance(params, SamplingParams):
        # What the model never generates holds for every request.
        forbidden = tuple(word for word in defaults.bad_words if word not in params.bad_words)
        shortest = max(params.min_new_tokens, defaults.min_new_tokens)
        if not forbidden and shortest == params.min_new_tokens:
            return params
        return replace(params, bad_words=(*params.bad_words, *forbidden), min_new_tokens=shortest)
    if params is None or isinstance(params, Mapping):
        fields = fields or params or {}
        check_names(fields)
        return replace(defaults, **fields)
    if is_generation_config(params):
        return SamplingParams(**generate_fields(params))
    raise InvalidParameter(
        f"{params!r:.60} is not a set of sampling parameters",
        "give mcsd.SamplingParams, a GenerationConfig, a dict, or keywords",
    )


def unused_defaults(params: SamplingParams, defaults: Mapping[str, Any]) -> list[str]:
    """Those of a model's defaults, as ``name=value``, that an explicit object leaves unused."""
    # Truncation has no effect on a greedy text.
    others = ("top_k", "top_p", "min_p", "typical_p") if params.temperature == 0 else ()
    used = {*params.given, *_ALWAYS_USED, *others}
    return [f"{name}={value}" for name, value in defaults.items() if name not in used]


def model_defaults(config: Any) -> dict[str, Any]:
    """The sampling parameters that a model's generation config sets: defaults for its requests.

    A config with ``do_sample=False`` means greedy decoding. One that only names special tokens sets nothing. A warning
    names fields that mcsd does not apply.
    """
    fields = sampling_fields(config)
    if getattr(config, "do_sample", None) is False:
        fields["temperature"] = 0.0
    if fields.get("top_k") == -1:
        fields["top_k"] = 0  # Some configs write "off" like this.
    unused = unsupported_fields(config, "stop_strings")
    for name, value in list(fields.items()):
        try:
            SamplingParams(**{name: value})
        except InvalidParameter:
            unused.append(f"{name}={fields.pop(name)!r:.40}")
    if unused:
        warnings.warn(
            f"mcsd does not apply {', '.join(unused)} of the model's generation config", McsdWarning, stacklevel=3
        )
    return fields
