"""Sampling parameters in the forms that users have them: keyword arguments, dicts, generation configs of transformers.

Free of torch and transformers: a generation config is read by its attributes.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mcsd.errors import InvalidParameter, McsdWarning
from mcsd.params import SamplingParams, check_names

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
"""Fields that a generation config and `SamplingParams` share, with the same meaning."""

_TRANSFORMERS_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""What ``generate`` of transformers uses for fields that a generation config leaves open."""

_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "top_h"), 1),
    **dict.fromkeys(("length_penalty", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing"), False),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "sequence_bias")),
    **dict.fromkeys(("watermarking_config", "force_words_ids", "constraints", "dola_layers", "max_time")),
}
"""Fields that change the text and that mcsd does not apply, with the values that have no effect; None and empty values
never have one."""


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
        return params
    if params is None or isinstance(params, Mapping):
        fields = fields or params or {}
        check_names(fields)
        return replace(defaults, **fields)
    if hasattr(params, "do_sample") and hasattr(params, "num_beams"):
        return from_generation_config(params)
    raise InvalidParameter(
        f"{params!r:.60} is not a set of sampling parameters",
        "give mcsd.SamplingParams, a GenerationConfig, a dict, or keywords",
    )


def from_generation_config(config: Any) -> SamplingParams:
    """The sampling parameters with which ``model.generate(generation_config=config)`` samples.

    Fields that the config leaves open count as in transformers: greedy unless ``do_sample``, top-k 50. Only the number
    of new tokens has mcsd's default. End-of-sequence tokens are always those of the model.

    Raises:
        InvalidParameter: a field that mcsd does not apply, by its name.
    """
    if unsupported := _unsupported_fields(config):
        name = unsupported[0]
        raise InvalidParameter(
            f"mcsd does not apply {name}={getattr(config, name)!r:.40} of the generation config", "leave it out"
        )
    if getattr(config, "max_new_tokens", None) is None and getattr(config, "max_length", None) is not None:
        raise InvalidParameter("max_length of a generation config counts the prompt", "give max_new_tokens")
    fields = _TRANSFORMERS_DEFAULTS | _sampling_fields(config)
    if not config.do_sample:
        fields["temperature"] = 0.0
    if getattr(config, "stop_strings", None) is not None:
        fields["stop"] = config.stop_strings
    return SamplingParams(**fields)


def model_defaults(config: Any) -> dict[str, Any]:
    """The sampling parameters that a model's generation config sets: defaults for its requests.

    A config with ``do_sample=False`` means greedy decoding. One that only names special tokens sets nothing. A warning
    names fields that mcsd does not apply.
    """
    fields = _sampling_fields(config)
    if getattr(config, "do_sample", None) is False:
        fields["temperature"] = 0.0
    if fields.get("top_k") == -1:
        fields["top_k"] = 0  # Some configs write "off" like this.
    unused = _unsupported_fields(config, "stop_strings")
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


def _sampling_fields(config: Any) -> dict[str, Any]:
    """The fields of `_SAMPLING` that a generation config names."""
    return {name: value for name in _SAMPLING if (value := getattr(config, name, None)) is not None}


def _unsupported_fields(config: Any, *others: str) -> list[str]:
    """Fields of a generation config, and ``others``, that would change the text and that mcsd does not apply."""
    neutral = _NEUTRAL | dict.fromkeys(others)
    values = {name: getattr(config, name, None) for name in neutral}
    return [name for name, value in values.items() if value not in (None, [], {}, neutral[name])]
