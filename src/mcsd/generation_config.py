"""What the fields of a ``GenerationConfig`` of transformers mean to mcsd. Free of torch: it reads attributes.

* Sampling fields have a counterpart in `mcsd.SamplingParams`.
* Constraints (`CONSTRAINTS`) forbid or force tokens; they hold for every request of a model, whatever its parameters.
* All other fields that would change the text are not applied, and are named.
"""

from typing import Any

from mcsd.errors import InvalidParameter, check_token_ids

_SAMPLING = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")},
    **{"max_new_tokens": "max_new_tokens", "min_new_tokens": "min_new_tokens", "bad_words_ids": "bad_words"},
}
"""Fields of a generation config that `SamplingParams` has, and their names there."""

CONSTRAINTS = (
    *("min_length", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
)
"""Fields that forbid or force tokens; see `mcsd.processors.constraint_processors`."""

_TRANSFORMERS_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""What ``generate`` of transformers uses for fields that a generation config leaves open."""

_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "top_h", "length_penalty"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("renormalize_logits", "token_healing"), False),
    **dict.fromkeys(("sequence_bias", "watermarking_config", "force_words_ids", "constraints", "dola_layers")),
    "max_time": None,
}
"""Fields that change the text and that mcsd does not apply, with the values that have no effect; None and empty values
never have one."""


def is_generation_config(value: Any) -> bool:
    """Whether an object is a ``GenerationConfig``."""
    return hasattr(value, "do_sample") and hasattr(value, "num_beams")


def generate_fields(config: Any) -> dict[str, Any]:
    """The fields of `SamplingParams` with which ``model.generate(generation_config=config)`` samples.

    Fields that the config leaves open count as in transformers: greedy unless ``do_sample``, top-k 50. Only the number
    of new tokens has mcsd's default. Its end-of-sequence tokens end a text besides those of the model.

    Raises:
        InvalidParameter: a field that mcsd does not apply, by its name.
    """
    if unsupported := unsupported_fields(config):
        name = unsupported[0]
        raise InvalidParameter(
            f"mcsd does not apply {name}={getattr(config, name)!r:.40} of the generation config", "leave it out"
        )
    if getattr(config, "max_new_tokens", None) is None and getattr(config, "max_length", None) is not None:
        raise InvalidParameter("max_length of a generation config counts the prompt", "give max_new_tokens")
    fields = _TRANSFORMERS_DEFAULTS | sampling_fields(config)
    if not config.do_sample:
        fields["temperature"] = 0.0
    ends = getattr(config, "eos_token_id", None)
    if ends is not None:
        fields["stop_token_ids"] = sorted(check_token_ids("eos_token_id", ends, InvalidParameter))
    for name, own in (("stop_strings", "stop"), ("num_return_sequences", "n")):
        if getattr(config, name, None) is not None:
            fields[own] = getattr(config, name)
    return fields


def sampling_fields(config: Any) -> dict[str, Any]:
    """The fields of `SamplingParams` that a generation config names."""
    return {own: value for name, own in _SAMPLING.items() if (value := getattr(config, name, None)) is not None}


def constraint_fields(*configs: Any) -> dict[str, Any]:
    """The `CONSTRAINTS` that have an effect; of several configs the first that names one counts."""
    named = {
        name: next((value for each in configs if (value := getattr(each, name, None)) is not None), None)
        for name in CONSTRAINTS
    }
    return {name: value for name, value in named.items() if not _is_neutral(name, value)}


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a constraint has no effect. Token 0 is a token."""
    return value in (None, [], ()) or value is False or (value == 0 and not name.startswith("forced_"))


def unsupported_fields(config: Any, *others: str) -> list[str]:
    """Fields of a generation config, and ``others``, that would change the text and that mcsd does not apply."""
    neutral = _NEUTRAL | dict.fromkeys(others)
    values = {name: getattr(config, name, None) for name in neutral}
    return [name for name, value in values.items() if value not in (None, [], {}, neutral[name])]
