"""The sampling parameters of a request: a frozen dataclass, validated once. Free of torch."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, TypeVar

from mcsd.errors import InvalidParameter, check_int, check_number
from mcsd.generation_config import constraint_fields, generate_fields

_ALIASES = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict", "num_predict"), "max_new_tokens"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), "stop"),
    **dict.fromkeys(("repeat_penalty", "repetition"), "repetition_penalty"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("topk", "top_n"), "top_k"),
    **dict.fromkeys(("topp", "nucleus"), "top_p"),
    **dict.fromkeys(("temp", "do_sample", "greedy"), "temperature (0 is greedy)"),
    **dict.fromkeys(("top_logprobs", "num_logprobs", "output_scores"), "logprobs"),
    **dict.fromkeys(("guided_json", "schema", "json"), "json_schema"),
    **dict.fromkeys(("guided_regex", "pattern"), "regex"),
    **dict.fromkeys(("guided_grammar", "lark", "gbnf", "ebnf"), "grammar (Lark, as llguidance reads it)"),
    **dict.fromkeys(
        ("response_format", "structured_outputs", "guided_decoding"), "json_schema, json_object, regex or grammar"
    ),
    "max_length": "max_new_tokens, which does not count the prompt",
    "generation_config": "it as the second argument: generate(prompt, config)",
}
"""Names that other libraries give to these parameters."""

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_COMPLETIONS = 256
MAX_BAD_WORDS = 4096
MAX_PREDICTION = 1 << 20
"""Characters or tokens of a predicted output."""

MAX_GRAMMAR = 1 << 17
"""Characters of a JSON schema, regular expression or grammar."""
MAX_SCHEMA_DEPTH = 64
"""Objects and lists of a JSON schema in each other."""

LogitsProcessor = Callable[[Any, Any], Any]
"""``(input_ids [1, n], logits [1, V]) -> logits [1, V]``, as a ``LogitsProcessor`` of transformers."""
StoppingCriterion = Callable[[Any, Any], Any]
"""``(input_ids [1, n], None) -> bool``, as a ``StoppingCriteria`` of transformers; also a bool tensor ``[1]``."""


_Class = TypeVar("_Class", bound=type)


def _names_checked(cls: _Class) -> _Class:
    """Make unknown keyword arguments of a dataclass a named error, and remember which fields were given."""
    init = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        values.pop("_given", None)  # As in SamplingParams(**vars(params)).
        check_names(values)
        init(self, *args, **values)
        given = [one.name for one in fields(cls)][: len(args)]
        object.__setattr__(self, "_given", frozenset((*given, *values)))

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@_names_checked
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. The defaults sample from the model's own distribution.

    Applied in this order: penalties, bias, bad words and minimal length, logits processors, temperature, top-k, top-p,
    min-p, typical-p (the last five as transformers does). A grammar (``json_schema``, ``json_object``, ``regex`` or
    ``grammar``, one of them) comes after the logits processors: tokens that it does not allow get no probability, and
    the text may end only where it may. They need the extra ``structured``.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens with at least this total probability, in (0, 1].
        min_p: drop tokens with less than this fraction of the highest probability, in [0, 1].
        typical_p: keep the most typical tokens with at least this total probability, in (0, 1] (Meister et al. 2022).
        max_new_tokens: at most this many new tokens.
        min_new_tokens: tokens that end a text get no probability before this many new tokens.
        n: completions of the prompt. With more than one a call returns a list of them; with a seed, the first is the
            text of that seed, and the others have seeds that follow from it.
        seed: makes the text reproducible, whatever else is in the batch; None draws a random one.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the text, besides the model's own.
        include_stop: whether the stop string is part of the text.
        skip_special_tokens: whether the text leaves out special tokens.
        bad_words: texts, or lists of token ids, that are never generated. A text is encoded with and without a space
            before it.
        repetition_penalty: > 1 discourages tokens of the prompt and the text (Keskar et al. 2019).
        presence_penalty: subtracted once from the logit of each token in the text so far.
        frequency_penalty: subtracted from a token's logit for each occurrence in the text so far.
        logit_bias: added to the logits of these token ids.
        logprobs: None, or the number of most probable alternatives to report with each token's log-probability. They
            are the model's own: before penalties, processors, temperature and truncation.
        prompt_logprobs: the same for the tokens of the prompt.
        ignore_eos: go on after an end-of-sequence token.
        logits_processors: called one after the other for every token that may be emitted, with the tokens before it and
            its logits. The distribution stays exact; each call takes its time.
        stopping_criteria: called after every token with all tokens so far; a true result ends the text.
        prediction: a text or token ids that the answer is expected to resemble, as in an edit of a given text. It is a
            source of candidates and does not change the distribution.
        speculative: whether candidates are proposed. Without them the text is decoded plainly, whatever else is in the
            batch, and a seed gives the text of plain decoding (in float32; otherwise up to rounding).
        json_schema: the text is JSON that this schema allows; a dict or JSON text.
        json_object: the text is a JSON object.
        regex: the whole text matches this regular expression.
        grammar: the text is in this grammar, in Lark as llguidance reads it.

    Raises:
        InvalidParameter: an unknown name; a value outside its range, NaN or infinite.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    n: int = 1
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    bad_words: Sequence[str | Sequence[int]] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    prediction: str | Sequence[int] | None = None
    speculative: bool = True
    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, (check, *limits) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL_NUMBERS:
                # numpy's numbers pass the checks; the fields are Python's.
                self._set(name, check(name, value, *limits, error=InvalidParameter))
        for name in ("ignore_eos", "include_stop", "skip_special_tokens", "speculative", "json_object"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameter(f"{name}={getattr(self, name)!r:.40} is not a bool", "give True or False")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidParameter(f"logit_bias={self.logit_bias!r:.80} is not a mapping", "give {token id: bias}")
        # Copies: the checked values must not change afterwards.
        self._set(
            "logit_bias",
            {
                _token("logit_bias token", token): check_number("logit_bias", bias, -1e4, 1e4, error=InvalidParameter)
                for token, bias in self.logit_bias.items()
            },
        )
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _tokens("stop_token_ids", self.stop_token_ids, MAX_BAD_WORDS))
        self._set("bad_words", _bad_words(self.bad_words))
        if self.prediction is not None and not isinstance(self.prediction, str):
            self._set("prediction", _tokens("prediction", self.prediction, MAX_PREDICTION))
        elif self.prediction is not None and len(self.prediction) > MAX_PREDICTION:
            raise InvalidParameter(
                f"prediction has {len(self.prediction)} characters; at most {MAX_PREDICTION} are allowed", "shorten it"
            )
        for name in ("logits_processors", "stopping_criteria"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or not all(map(callable, given)):
                raise InvalidParameter(f"{name}={given!r:.60} is not a list of callables", f"give {name}=[...]")
            self._set(name, tuple(given))
        if self.json_schema is not None:
            self._set("json_schema", schema_text(self.json_schema))
        for name in ("regex", "grammar"):
            _check_grammar_text(name, getattr(self, name))
        given = [name for name in _GRAMMARS if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise InvalidParameter(f"{' and '.join(given)} are given together", "give one of them")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def given(self) -> frozenset[str]:
        """The fields that were named when the object was made."""
        return frozenset(vars(self)["_given"])

    @classmethod
    def from_generation_config(cls, source: Any) -> "SamplingParams":
        """The sampling parameters with which ``generate`` of transformers samples.

        Args:
            source: a ``GenerationConfig``, or a model, whose own is read. What it leaves open counts as in
                transformers: greedy unless ``do_sample``, top-k 50.

        Raises:
            InvalidParameter: a field that mcsd does not apply, or a constraint of a config, by its name. The
                constraints of a model hold for all requests of its engine.
        """
        config = getattr(source, "generation_config", source)
        if config is source and (constraints := constraint_fields(config)):
            raise InvalidParameter(
                f"{next(iter(constraints))} of a generation config is no sampling parameter",
                "give the config itself: engine.generate(prompt, config)",
            )
        return cls(**generate_fields(config))

    @property
    def is_seeded(self) -> bool:
        """Whether a seed promises the same sampled text in any batch: its steps must not depend on other sequences."""
        return self.seed is not None and self.temperature > 0

    @property
    def grammar_source(self) -> tuple[str, str] | None:
        """The field that constrains the text, and its schema, expression or grammar; None if there is none."""
        if self.json_object:
            return "json_object", '{"type": "object"}'
        given = ((name, getattr(self, name)) for name in _GRAMMARS)
        return next(((name, text) for name, text in given if isinstance(text, str)), None)

    @property
    def changes_logits(self) -> bool:
        """Whether penalties, a bias or processors change the logits, which then depend on the text so far."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias or self.logits_processors) or penalties != (1.0, 0.0, 0.0)


_NUMBERS: Mapping[str, tuple[Any, ...]] = {
    "temperature": (check_number, 0, 1e4),
    "top_k": (check_int, 0, 2**31),
    "top_p": (partial(check_number, low_open=True), 0, 1),
    "min_p": (check_number, 0, 1),
    "typical_p": (partial(check_number, low_open=True), 0, 1),
    "max_new_tokens": (check_int, 1, 2**31),
    "min_new_tokens": (check_int, 0, 2**31),
    "n": (check_int, 1, MAX_COMPLETIONS),
    "seed": (check_int, 0, 2**64 - 1),
    "repetition_penalty": (partial(check_number, low_open=True), 0, 100),
    "presence_penalty": (check_number, -100, 100),
    "frequency_penalty": (check_number, -100, 100),
    "logprobs": (check_int, 0, MAX_LOGPROBS),
    "prompt_logprobs": (check_int, 0, MAX_LOGPROBS),
}
_OPTIONAL_NUMBERS = ("seed", "logprobs", "prompt_logprobs")


_GRAMMARS = ("json_schema", "json_object", "regex", "grammar")


def _token(name: str, value: Any) -> int:
    return check_int(name, value, 0, 2**31, InvalidParameter)


def _tokens(name: str, values: Any, most: int) -> tuple[int, ...]:
    """Token ids as a tuple of Python's numbers."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Collection) or len(values) > most:
        raise InvalidParameter(f"{name}={values!r:.60} is not a list of at most {most} token ids", f"give {name}=[...]")
    return tuple(_token(name, value) for value in values)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    """Strings that end a text, as a tuple."""
    strings = (stop,) if isinstance(stop, str) else stop
    if (
        isinstance(strings, Sequence)
        and len(strings) <= MAX_STOP_STRINGS
        and all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_LENGTH for one in strings)
    ):
        return tuple(strings)
    raise InvalidParameter(
        f"stop={stop!r:.80}: not at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters",
        "give one string or a short list of strings",
    )


def _bad_words(words: Any) -> tuple[str | tuple[int, ...], ...]:
    """Words that are never generated, as a tuple."""
    if isinstance(words, str | bytes) or not isinstance(words, Sequence) or len(words) > MAX_BAD_WORDS:
        raise InvalidParameter(
            f"bad_words={words!r:.60} is not a list of at most {MAX_BAD_WORDS} words", 'give ["a text", [token ids]]'
        )
    checked = tuple(word if isinstance(word, str) else _tokens("bad_words", word, MAX_STOP_LENGTH) for word in words)
    if not all(checked):
        raise InvalidParameter(f"bad_words={words!r:.60} has an empty word", "leave it out")
    return checked


def _check_grammar_text(name: str, text: Any) -> None:
    if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_GRAMMAR):
        raise InvalidParameter(
            f"{name}={text!r:.60} is not a text of 1 to {MAX_GRAMMAR} characters", f"give {name} as a text"
        )


def schema_text(schema: Any) -> str:
    """A JSON schema as JSON text.

    Raises:
        InvalidParameter: it is none, or exceeds `MAX_GRAMMAR` or `MAX_SCHEMA_DEPTH`.
    """
    parsed = schema
    try:
        if isinstance(schema, str):
            _check_grammar_text("json_schema", schema)
            parsed = json.loads(schema)
        if not isinstance(parsed, dict):
            raise ValueError("a schema is a JSON object")
        _check_depth(parsed)
        text = json.dumps(parsed, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        shown = repr(schema[:60]) if isinstance(schema, str) else f"<{type(schema).__name__}>"
        raise InvalidParameter(
            f"json_schema={shown} is not a JSON schema: {error!s:.80}", "give a dict, or its JSON text"
        ) from error
    _check_grammar_text("json_schema", text)
    return text


def _check_depth(schema: dict[str, Any]) -> None:
    """Raise `ValueError` if a schema is too deep, or has more values than a text of `MAX_GRAMMAR` characters."""
    level: list[Any] = [schema]
    values = 0
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [part for part in level if isinstance(part, dict | list | tuple)]
        values += len(level)
        if not level:
            return
        if values > MAX_GRAMMAR:
            break
    raise ValueError(f"it is deeper than {MAX_SCHEMA_DEPTH}, or larger than {MAX_GRAMMAR} characters")


def check_names(names: Iterable[str]) -> None:
    """Check that all names are sampling parameters.

    Raises:
        InvalidParameter: one is not; the hint gives the right name.
    """
    known = [one.name for one in fields(SamplingParams)]
    for name in names:
        if not isinstance(name, str):
            raise InvalidParameter(f"{name!r:.40} is not a sampling parameter", f"one of {', '.join(known)}")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            right = _ALIASES.get(name) or (close[0] if close else None)
            hint = f"use {right}" if right else f"one of {', '.join(known)}"
            raise InvalidParameter(f"{name!r:.40} is not a sampling parameter", hint)
