"""From what users give, texts, conversations, token ids, to token ids that a model can read."""

from collections.abc import Sequence
from operator import index
from typing import Any

from mcsd.errors import EmptyPrompt, InvalidParameter, PromptTooLong, TokenOutOfVocabulary, UnsupportedModel
from mcsd.params import SamplingParams

Prompt = str | list[int]
Prompts = list[str] | list[list[int]] | list[Prompt]
Message = dict[str, str]


class Encoder:
    """Encodes and checks prompts.

    Args:
        tokenizer: of the target; None for token ids only.
        name: of the target.
        vocab_size: its tokens.
        max_length: the most tokens of a text, prompt included.
    """

    def __init__(self, tokenizer: Any | None, name: str, vocab_size: int, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._vocab_size = vocab_size
        self._max_length = max_length

    def encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """A prompt as token ids, fit to be run with these parameters.

        Raises:
            RequestError: prompt or parameters are not of the kind, too long, or outside the vocabulary.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidParameter(f"{params!r:.60} is not an mcsd.SamplingParams", "give one, or one for each prompt")
        ids = self._tokens(prompt)
        if not ids or prompt == "":
            raise EmptyPrompt("the prompt is empty", "give at least one token")
        if len(ids) >= self._max_length:
            raise PromptTooLong(
                f"a prompt of {len(ids)} tokens leaves no room in {self._max_length}",
                "shorten it or raise max_length, up to the model's context",
            )
        for token in (*ids, *params.logit_bias):
            if not 0 <= token < self._vocab_size:
                raise TokenOutOfVocabulary(
                    f"token id {token} is outside [0, {self._vocab_size})", "check the tokenizer"
                )
        if params.stop and self._tokenizer is None:
            raise InvalidParameter("stop strings, and the engine has no tokenizer", "give a tokenizer")
        return ids

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, in the model's chat template, ready for the answer.

        Raises:
            UnsupportedModel: there is no template.
            InvalidParameter: it refuses the messages.
        """
        if self._tokenizer is None or not self.chats:
            raise UnsupportedModel(f"{self._name} has no chat template", "use generate with a text")
        try:
            return list(
                self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
            )
        except Exception as error:
            # The template is the model's own code: it raises what it likes.
            raise InvalidParameter(
                f"the chat template refuses these messages: {error!r:.100}", 'give [{"role": "user", "content": "..."}]'
            ) from error

    def ask(self, text: str) -> list[int]:
        """A question as token ids: in the model's chat template, if there is one, else as it is.

        Raises:
            RequestError: as `chat` and `encode`.
        """
        return self.chat([{"role": "user", "content": text}]) if self.chats else self.encode(text, SamplingParams())

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidParameter("a text, and the engine has no tokenizer", "give token ids or a tokenizer")
            return list(self._tokenizer(prompt)["input_ids"])
        try:
            return [index(token) for token in prompt]
        except TypeError as error:
            raise InvalidParameter(
                f"prompt {prompt!r:.60} is neither a text nor a list of token ids", "give [[1, 5, 7]] for one prompt"
            ) from error
