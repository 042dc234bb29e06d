"""Structured output: the tokens that a JSON schema, a regular expression or a grammar allows after a text.

llguidance parses. Each request has a matcher, whose state follows its text. Candidates are consumed and rolled back, so
every node of a tree is masked by the state of its own path, for target and draft alike.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcsd.errors import InvalidGrammar, InvalidParameter, MissingPackage, UnsupportedModel
from mcsd.params import SamplingParams

MAX_COMPILED = 32
"""Compiled grammars that an engine keeps."""

_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Of llguidance: some milliseconds to compile or to compute a mask, and at most 50 MB of lexer states for a grammar."""

_STACK = 1 << 28
"""Bytes of the stack on which grammars are compiled: a long chain of references, which a request may send, would
overflow a common one and end the process. Pages that are not used take no memory."""

_stack_size = threading.Lock()


class GrammarMatcher:
    """The state of a grammar after the text of one request.

    Args:
        matcher: of llguidance, at the start of a text.
        vocab_size: of the target.
        ends: tokens that end a text. They are allowed where the grammar may end, and nowhere else.
        never: tokens that end no text of this request and are not part of one.

    Attributes:
        error: why the grammar cannot go on, or "".
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: Collection[int], never: Collection[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends, self._never = frozenset(ends), frozenset(never)
        self._path: tuple[int, ...] = ()
        self._forbidden: dict[tuple[int, ...], Tensor | None] = {}
        self.error = ""

    def copy(self) -> "GrammarMatcher":
        """A matcher in the same state, for another request."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._ends, self._never)

    def forbidden(self, path: Sequence[int]) -> Tensor | None:
        """The tokens that may not follow the text and some candidates.

        Args:
            path: the candidates after the text, in order.

        Returns:
            bool ``[V]``; None if the grammar has failed. After a path that has ended the text, or that the grammar does
            not allow, nothing is emitted: there all tokens are forbidden but those that end a text.
        """
        key = tuple(path)
        if key not in self._forbidden:
            self._forbidden[key] = self._compute(key)
        return self._forbidden[key]

    def commit(self, tokens: Sequence[int]) -> None:
        """Take the tokens that a step has emitted as part of the text."""
        if self._ends.isdisjoint(tokens) and not self._move(tuple(tokens)):
            self.error = self.error or "it does not allow its own text"
        self._path, self._forbidden = (), {}

    def _compute(self, path: tuple[int, ...]) -> Tensor | None:
        if self.error:
            return None
        if not self._ends.isdisjoint(path) or not self._move(path):
            return None if self.error else self._all_but_ends()
        bits = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        may_end = self._matcher.is_accepting()
        if self._failed():
            return None
        forbidden = np.unpackbits(~bits.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)
        forbidden[list(self._never)] = True
        forbidden[list(self._ends)] = not may_end
        return torch.from_numpy(forbidden)

    def _all_but_ends(self) -> Tensor:
        forbidden = torch.ones(self._vocab_size, dtype=torch.bool)
        forbidden[list(self._ends)] = False
        return forbidden

    def _move(self, path: tuple[int, ...]) -> bool:
        """Whether the matcher can be, and is, after a path. What it has in common with the last one is not repeated."""
        both = zip(path, self._path, strict=False)
        same = next((i for i, (new, old) in enumerate(both) if new != old), min(len(path), len(self._path)))
        if same < len(self._path):
            self._matcher.rollback(len(self._path) - same)
        consumed = self._matcher.try_consume_tokens(list(path[same:])) if same < len(path) else 0
        self._path = path[: same + consumed]
        return not self._failed() and len(self._path) == len(path)

    def _failed(self) -> bool:
        if self._matcher.is_error():
            self.error = _one_line(self._matcher.get_error())
        return bool(self.error)


class GrammarCompiler:
    """Compiles the grammars of requests. The tokenizer is prepared once, by the first of them.

    Args:
        tokenizer: of the target, or None.
        vocab_size: of the target.
        eos_token_ids: of the target and its tokenizer.
    """

    def __init__(self, tokenizer: Any | None, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._compiled = lru_cache(MAX_COMPILED)(lambda *source: _on_a_large_stack(lambda: self._compile(*source)))

    def matcher(self, params: SamplingParams, ends: Collection[int]) -> GrammarMatcher | None:
        """The matcher of a request; None if it has no grammar.

        Args:
            params: of the request.
            ends: the tokens that end its text.

        Raises:
            InvalidGrammar: the schema, expression or grammar is wrong, or has a part that does not compile, by name.
            InvalidParameter: there is no tokenizer, or no token that ends a text.
            UnsupportedModel: the tokenizer cannot be used.
            MissingPackage: llguidance is not installed.
        """
        if params.grammar_source is None:
            return None
        kind, text = params.grammar_source
        if self._tokenizer is None:
            raise InvalidParameter(f"{kind} needs a tokenizer, and the engine has none", "give a tokenizer")
        if not ends:
            reason = "ignore_eos leaves none" if params.ignore_eos else "the model has none"
            raise InvalidParameter(f"{kind} needs a token that ends the text, and {reason}", "give stop_token_ids")
        matcher = self._compiled(kind, text).deep_copy()
        return GrammarMatcher(matcher, self._vocab_size, ends, {*self._vocabulary.eos_tokens} - {*ends})

    def _compile(self, kind: str, text: str) -> Any:
        """The matcher of llguidance at the start of a text."""
        vocabulary = self._vocabulary
        from llguidance import LLMatcher, LLParserLimits

        try:
            if kind == "regex":
                source = LLMatcher.grammar_from_regex(text)
            elif kind == "grammar":
                source = LLMatcher.grammar_from_lark(text)
            else:
                # A schema must not say that its keywords may be ignored.
                source = LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False})
            matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(**_LIMITS))
            if not matcher.is_error():
                matcher.compute_bitmask()  # Some grammars turn out to be too complex, or empty, at their first token.
        except (ValueError, UnicodeError) as error:
            raise InvalidGrammar(f"{kind} does not compile: {_one_line(str(error))}", _HINTS[kind]) from error
        if matcher.is_error():
            raise InvalidGrammar(f"{kind} does not compile: {_one_line(matcher.get_error())}", _HINTS[kind])
        return matcher

    @cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer of llguidance."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingPackage(
                "structured output needs llguidance, which is not installed", 'run pip install "mcsd[structured]"'
            ) from error
        eos = sorted(self._eos) or None
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=eos)
        except Exception as error:
            # It reads the tokenizer's own description, and may not know some part of it.
            raise UnsupportedModel(
                f"structured output cannot use this tokenizer: {_one_line(str(error))}",
                "give a fast tokenizer, whose tokens are bytes or characters",
            ) from error


def _on_a_large_stack(function: Callable[[], Any]) -> Any:
    """The result of a function, called in a thread of its own with a stack of `_STACK` bytes."""
    with ThreadPoolExecutor(1) as pool:
        with _stack_size:
            before = threading.stack_size(_STACK)
            try:
                result = pool.submit(function)
            finally:
                threading.stack_size(before)
        return result.result()


_HINTS = {
    "json_schema": "leave the keyword out, or mend the schema",
    "json_object": "",
    "regex": "give a regular expression without look-around and back-references",
    "grammar": "give a Lark grammar as llguidance reads it, with a rule named start",
}


def mask_tokens(
    logits: Tensor,
    matchers: Sequence[GrammarMatcher | None],
    paths: Sequence[Sequence[int]],
    vocabulary: Tensor | None = None,
) -> Tensor:
    """Logits with -inf for the tokens that grammars forbid.

    Args:
        logits: ``[A, K]``.
        matchers: of the A rows; None: nothing is forbidden.
        paths: the candidates that lead to each row, after the text.
        vocabulary: int64 ``[K]``, the token id of each logit; None: the logit's own index.
    """
    both = zip(matchers, paths, strict=True)
    rows = [None if matcher is None else matcher.forbidden(path) for matcher, path in both]
    size = next((len(row) for row in rows if row is not None), 0)
    if not size:
        return logits
    nothing = torch.zeros(size, dtype=torch.bool)
    every = [nothing if row is None else row for row in rows]
    forbidden = (every[0][None] if len(every) == 1 else torch.stack(every)).to(logits.device)
    forbidden = forbidden[:, : logits.shape[1]] if vocabulary is None else forbidden.index_select(1, vocabulary)
    return logits.masked_fill(forbidden, -torch.inf)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
