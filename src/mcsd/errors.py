"""Every error mcsd raises on purpose: one line that says what was given, and a hint that says what to do.

* McsdError
  x ModelError                 the model or its weights
    + UnknownModel             no such name, path or hub id
    + UnsupportedModel         an architecture the engine cannot run
    + VocabularyMismatch       draft and target do not share a vocabulary
    + WeightsCorrupt           a broken, truncated or altered weight file
    + DownloadFailed           the index or hub could not deliver
  x OutputFailed               a file could not be written
  x DataError                  text to learn from is missing, empty or unreadable
  x MissingPackage             a package that an extra brings is not installed
  x OptionError                a setting of the engine
    + UnknownScheme
    + InvalidTree
    + InvalidOption            any other option with a value outside its range
  x RequestError               one request; nothing else that is running is disturbed
    + InvalidParameter         a sampling parameter outside its range
    + EmptyPrompt
    + PromptTooLong
    + TokenOutOfVocabulary
    + NonFiniteLogits          the model gave NaN or no finite logit for this request
    + RequestInterrupted       cancelled, or running when a step of the engine was broken off

A `McsdWarning` is no error: something works as it should, but less well than it could.

``exit_code`` is what the command line ends with: 1 the work failed, 2 the words were wrong.
"""

from typing import Any


class McsdWarning(UserWarning):
    """Something works as it should, but less well than it could; the line says why."""


class McsdError(Exception):
    """Base of all errors of mcsd.

    Args:
        message: what was given and what is allowed, in one line.
        hint: what to do about it, in one line; may be empty.
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
    """No model by that name, path or hub id."""


class UnsupportedModel(ModelError):
    """An architecture or file kind that the engine cannot run."""


class VocabularyMismatch(ModelError):
    """Draft and target do not share a vocabulary."""


class WeightsCorrupt(ModelError):
    """A broken, truncated or altered weight file."""

    exit_code = 1


class DownloadFailed(ModelError):
    """The package index or the hub could not deliver the weights."""

    exit_code = 1


class OutputFailed(McsdError):
    """A file could not be written: a full disk, a folder without the right to write."""

    exit_code = 1


class DataError(McsdError):
    """Text to learn from is missing, empty or unreadable."""


class MissingPackage(McsdError):
    """A package that an extra brings is not installed."""

    exit_code = 1


class OptionError(McsdError):
    """A setting of the engine."""


class UnknownScheme(OptionError):
    """No verification scheme by that name."""


class InvalidTree(OptionError):
    """Not a tree: see `mcsd.TreeShape.parse` for what is."""


class InvalidOption(OptionError):
    """An option with a value outside its range."""


class RequestError(McsdError):
    """One request is at fault; nothing else that is running is disturbed.

    Attributes:
        completions: of the requests given together with this one, in order; None for those that failed. Empty if
            nothing was generated.
    """

    completions: tuple[Any, ...] = ()


class InvalidParameter(RequestError):
    """A sampling parameter outside its range."""


class EmptyPrompt(RequestError):
    """A prompt with no token."""


class PromptTooLong(RequestError):
    """A prompt that leaves no room for a new token."""


class TokenOutOfVocabulary(RequestError):
    """A token id outside ``[0, vocabulary size)``."""


class NonFiniteLogits(RequestError):
    """The model's logits for this request hold NaN, or no finite value at all."""

    exit_code = 1


class RequestInterrupted(RequestError):
    """The request was cancelled, or was running when a step of the engine was broken off."""

    exit_code = 1
