"""Prompts to token ids. Free of torch."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

from mcsd.control_tokens import SpecialTokensAsText
from mcsd.errors import EmptyPrompt, InvalidParameter, PromptTooLong, TokenOutOfVocabulary, UnsupportedModel
from mcsd.params import SamplingParams

Prompt = str | list[int]
Prompts = list[str] | list[list[int]] | list[Prompt]
Message = dict[str, str]

PROMPT_FORMS = "give a text, token ids, a list of either, or what a tokenizer returns"
_MOST_ADDED = 8
"""More tokens than any tokenizer adds at the beginning of a text."""


class PromptEncoder:
    """Encodes prompts and checks them.

    Args:
        tokenizer: of the target; None if prompts are token ids only.
        name: of the target, for error messages.
        vocab_size: of the target.
        max_length: the most tokens of a text, prompt included.
    """

    def __init__(self, tokenizer: Any | None, name: str, vocab_size: int, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._vocab_size = vocab_size
        self._max_length = max_length

    def encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Encode a prompt and check that it can run with these parameters.

        Raises:
            RequestError: a wrong type, an empty or too long prompt, or a token id outside the vocabulary.
        """
        ids = self._to_ids(prompt)
        if not ids or (isinstance(prompt, str) and not prompt):
            raise EmptyPrompt("the prompt is empty", "give at least one token")
        if len(ids) >= self._max_length:
            raise PromptTooLong(
                f"a prompt of {len(ids)} tokens leaves no space for a new token: max_length is {self._max_length}",
                "shorten it or raise max_length, up to the model's context",
            )
        self._check_vocabulary((*ids, *params.logit_bias, *params.stop_token_ids))
        if params.stop and self._tokenizer is None:
            raise InvalidParameter("stop strings need a tokenizer, and the engine has none", "give a tokenizer")
        return ids

    def encode_words(self, words: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Words as token ids, a text with and without a space before it.

        Raises:
            RequestError: there is no tokenizer, or a token id outside the vocabulary.
        """
        encoded: list[list[int]] = []
        for word in words:
            if not isinstance(word, str):
                encoded.append(list(word))
                continue
            if self._tokenizer is None:
                raise InvalidParameter("bad words as texts need a tokenizer, and the engine has none", "give token ids")
            for text in (word, f" {word}"):
                ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
                encoded += [ids] if ids and ids not in encoded else []
        for ids in encoded:
            self._check_vocabulary(ids)
        return encoded

    def _check_vocabulary(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise TokenOutOfVocabulary(
                    f"token id {token} is outside [0, {self._vocab_size})", "check the tokenizer"
                )

    def encode_prediction(self, params: SamplingParams) -> SamplingParams:
        """The parameters with their prediction, if any, as token ids.

        Raises:
            RequestError: a text without a tokenizer, or a token id outside the vocabulary.
        """
        ids = params.prediction
        if isinstance(ids, str):
            if self._tokenizer is None:
                raise InvalidParameter(
                    "a prediction as a text needs a tokenizer, and the engine has none", "give its token ids"
                )
            ids = self._tokenizer(ids, add_special_tokens=False)["input_ids"]
        self._check_vocabulary(ids or ())
        return replace(params, prediction=ids) if ids is not params.prediction else params

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Encode a conversation in the model's chat template, with the prompt for the answer.

        Special tokens written as text in a message or tool stay text: only the template makes control tokens.

        Args:
            messages: the conversation.
            tools: definitions of functions that the model may call, for templates that take them.

        Raises:
            UnsupportedModel: there is no template.
            InvalidParameter: the template refuses the messages.
        """
        if self._tokenizer is None:
            raise InvalidParameter("a conversation needs a tokenizer, and the engine has none", "give a tokenizer")
        if not self.has_chat_template:
            raise UnsupportedModel(f"{self._name} has no chat template", "use generate with a text")
        written = SpecialTokensAsText(self._tokenizer, [*messages, *(tools or ())])
        options: dict[str, Any] = {"tools": written.split(tools)} if tools else {}
        render = partial(self._tokenizer.apply_chat_template, add_generation_prompt=True, **options)
        try:
            if not written.found:
                return list(render(list(messages), return_dict=False))
            pieces = written.pieces(render(written.split(messages), tokenize=False))
            return [id for piece in pieces for id in self._tokenizer(piece, add_special_tokens=False)["input_ids"]]
        except Exception as error:
            # The template is code of the model and may raise anything.
            raise InvalidParameter(
                f"the chat template refuses these messages: {error!r:.100}", 'give [{"role": "user", "content": "..."}]'
            ) from error

    def encode_question(self, text: str) -> list[int]:
        """Encode a question: in the model's chat template if there is one, else as plain text.

        Raises:
            RequestError: as `encode_chat` and `encode`.
        """
        if self.has_chat_template:
            return self.encode_chat([{"role": "user", "content": text}])
        return self.encode(text, SamplingParams())

    def _to_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidParameter(
                    "a text prompt needs a tokenizer, and the engine has none", "give token ids or a tokenizer"
                )
            return self._encode_text(prompt)
        try:
            if any(isinstance(token, bool) for token in prompt):
                raise TypeError("a bool is no token id")
            return [index(token) for token in prompt]
        except TypeError as error:
            raise InvalidParameter(f"prompt {prompt!r:.60} is neither a text nor token ids", PROMPT_FORMS) from error

    def _encode_text(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds, unless the text has them already."""
        assert self._tokenizer is not None
        try:
            text.encode()
        except UnicodeError as error:
            raise InvalidParameter("the prompt is not valid Unicode text", "decode it with its own encoding") from error
        ids = list(self._tokenizer(text)["input_ids"])
        # A text in a chat template begins with the token that a tokenizer adds (BOS), or with some tokens.
        if ids and ids[0] in ids[1:_MOST_ADDED]:
            plain = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            for added in range(1, len(ids) - len(plain) + 1):
                if ids[added : added + len(plain)] == plain and ids[:added] == plain[:added]:
                    return ids[added:]
        return ids
