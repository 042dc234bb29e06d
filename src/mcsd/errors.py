"""All errors that mcsd raises on purpose: one line that says what was given, and a hint that says what to do.

    * McsdError
      x ModelError                 the model or its weights
        + UnknownModel             no model has this name, path or hub id
        + UnsupportedModel         an architecture the engine cannot run
        + VocabularyMismatch       draft and target do not share a vocabulary
        + WeightsCorrupt           a broken, truncated or altered weight file
        + DownloadFailed           the package index or the hub did not deliver the weights
      x OutputFailed               a file could not be written
      x OutOfMemory                the weights or the key-value cache do not fit into memory
      x DataError                  training text or prompts are missing, empty or unreadable
      x MissingPackage             an optional dependency is not installed
      x OptionError                an option of the engine or of a command
        + UnknownScheme
        + InvalidTree
        + InvalidOption            another option with a value outside its range
      x RequestError               one request; other requests are not affected
        + InvalidParameter         a sampling parameter outside its range
          - InvalidGrammar         a schema, regular expression or grammar that does not compile
        + EmptyPrompt
        + PromptTooLong
        + TokenOutOfVocabulary
        + StoppingCriterionFailed  a stopping criterion of the request raised an error
        + NonFiniteLogits          the model's logits have NaN or no finite value
        + NoTokenLeft              the parameters of the request leave no token to go on with
        + ProcessorFailed          a logits processor of the request raised an error
        + GrammarFailed            the grammar of the request became too complex in the middle of its text
        + RequestInterrupted       cancelled, or running when an engine step was interrupted
        + StepFailed               a step with this request alone raised an error
        + EngineBusy               too many requests wait, or the engine was called from inside its own step
        + EngineClosed             the engine was closed
        + RequestTimedOut          waited or ran for too long
        + StepHung                 a step of the engine did not end
        + ReplicaLost              the process that made the text has ended

A `McsdWarning` is not an error: the result is correct, but slower or less than possible.

``exit_code`` is the exit code of the command line: 1 the work failed, 2 the command line or an option was wrong.
"""

from collections.abc import Collection, Mapping
from math import inf
from numbers import Integral, Real
from typing import Any


class McsdWarning(UserWarning):
    """The result is correct, but slower or less than possible; the message says why."""


class McsdError(Exception):
    """Base of all errors of mcsd.

    Args:
        message: one line: what was given and what is allowed.
        hint: one line: what to do; may be empty.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ModelError(McsdError):
    """The model or its weights."""


class UnknownModel(ModelError):
    """No model has this name, path or hub id."""


class UnsupportedModel(ModelError):
    """An architecture or file format that the engine cannot run."""


class VocabularyMismatch(ModelError):
    """Draft and target do not share a vocabulary."""


class WeightsCorrupt(ModelError):
    """A broken, truncated or altered weight file."""

    exit_code = 1


class DownloadFailed(ModelError):
    """The package index or the hub did not deliver the weights."""

    exit_code = 1


class OutputFailed(McsdError):
    """A file could not be written: the disk is full, or the folder is not writable."""

    exit_code = 1


class OutOfMemory(McsdError):
    """The weights or the key-value cache do not fit into memory."""

    exit_code = 1


class DataError(McsdError):
    """Training text or prompts are missing, empty or unreadable."""


class MissingPackage(McsdError):
    """An optional dependency is not installed."""

    exit_code = 1


class OptionError(McsdError):
    """An option of the engine or of a command."""


class UnknownScheme(OptionError):
    """No verification scheme has this name."""


class InvalidTree(OptionError):
    """Not a valid tree; see `mcsd.TreeShape.parse`."""


class InvalidOption(OptionError):
    """An option with a value outside its range."""


class RequestError(McsdError):
    """One request failed; other requests are not affected.

    Attributes:
        completions: of all requests of the same call, in order; None for those that failed. Empty if nothing was
            generated.
    """

    completions: tuple[Any, ...] = ()


class InvalidParameter(RequestError):
    """A sampling parameter outside its range."""


class InvalidGrammar(InvalidParameter):
    """A JSON schema, regular expression or grammar that is wrong, or has a part that does not compile."""


class EmptyPrompt(RequestError):
    """A prompt with no token."""


class PromptTooLong(RequestError):
    """A prompt that leaves no space for a new token."""


class TokenOutOfVocabulary(RequestError):
    """A token id outside ``[0, vocabulary size)``."""


class StoppingCriterionFailed(RequestError):
    """A stopping criterion of the request raised an error, which is the cause of this one."""

    exit_code = 1


class NonFiniteLogits(RequestError):
    """The model's logits for this request hold NaN, or no finite value at all."""

    exit_code = 1


class NoTokenLeft(RequestError):
    """The logits are finite, but the parameters of the request leave no token: a grammar and bad words, for example."""

    exit_code = 1


class ProcessorFailed(RequestError):
    """A logits processor of the request raised an error."""

    exit_code = 1


class GrammarFailed(RequestError):
    """The grammar of the request failed in the middle of its text, as where a limit was reached."""

    exit_code = 1


class RequestInterrupted(RequestError):
    """The request was cancelled, or was running when an engine step was interrupted."""

    exit_code = 1


class StepFailed(RequestError):
    """A step with this request alone raised an error, which is the cause of this one."""

    exit_code = 1


class EngineBusy(RequestError):
    """Too many requests are waiting, or the engine was called from inside one of its own steps."""

    exit_code = 1


class EngineClosed(RequestError):
    """The engine was closed and takes no more requests."""

    exit_code = 1


class RequestTimedOut(RequestError):
    """The request waited, or ran, for longer than the server allows."""

    exit_code = 1


class StepHung(RequestError):
    """A step of the engine did not end in time; the engine cannot go on."""

    exit_code = 1


class ReplicaLost(RequestError):
    """The replica that made the text has ended, or its engine has failed; a text that has begun is cut off."""

    exit_code = 1


def step_error(cause: BaseException) -> RequestError:
    """The error of a request whose step has raised ``cause``; its message has only the class of a foreign error."""
    error: RequestError
    if isinstance(cause, Exception):
        what = cause.message if isinstance(cause, McsdError) else type(cause).__name__
        error = StepFailed(f"a step of the engine failed: {what}", "see the cause of this error")
    else:
        error = RequestInterrupted("a step of the engine was interrupted", "submit the request again")
    error.__cause__ = cause
    return error


def one_line(error: BaseException) -> str:
    """The message of an error of another library in one line, or the name of its class if it has none."""
    message = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(message.split()) or type(error).__name__


def check_int(name: str, value: object, low: int, high: int, error: type[McsdError] = InvalidOption) -> int:
    """Check that ``value`` is an integer in ``[low, high]``, of Python or numpy; a bool is none.

    Returns:
        The value, as an ``int``.

    Raises:
        InvalidOption: it is not; or ``error``, where another class is given.
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        raise error(
            f"{name}={_shown(value)} is not an integer from {low} to {high}", f"give {name} an integer in that range"
        )
    return number


def check_token_ids(name: str, value: object, error: type[McsdError] = InvalidOption) -> frozenset[int]:
    """Check that ``value`` is a token id or a collection of them, of Python, numpy or torch; None is no token.

    Returns:
        The token ids. Negative ones, with which some configurations say that there is none, are left out.

    Raises:
        InvalidOption: it is not; or ``error``, where another class is given.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        value = () if value is None else (value,)
    plain = [one.tolist() if hasattr(one, "tolist") else one for one in value]
    return frozenset(token for one in plain if (token := check_int(name, one, -(2**31), 2**31, error)) >= 0)


def check_number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    error: type[McsdError] = InvalidOption,
) -> float:
    """Check that ``value`` is a finite number (also of numpy) in ``[low, high]``, or ``(low, high]``; a bool is none.

    Returns:
        The value, as an ``int`` or ``float``.

    Raises:
        InvalidOption: it is not; or ``error``, where another class is given.
    """
    number: float | None = None
    if isinstance(value, Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
    # NaN fails every comparison. Comparisons, unlike math.isfinite, take integers of any size.
    if number is None or not (low <= number <= high and number < inf) or (low_open and number == low):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{']' if high < inf else ')'}"
        raise error(
            f"{name}={_shown(value)} is not a number in {interval}", f"give {name} a finite number in that range"
        )
    return number


def _shown(value: object) -> str:
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python prints no integer of more than 4300 digits.
        return f"<{type(value).__name__} too large to print>"
