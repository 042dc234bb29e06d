"""An engine in which chosen requests meet faults: by tokens of their texts, or by a sampling parameter."""

from typing import Any

import torch

import mcsd
from mcsd.models import ModelOutput
from support.server import Table, chat_tokenizer

TARGET, MEMORY, DRAFT, NAN, DECODE, ENCODE = "TMDNKZ"
"""Characters that break the target, its memory, the draft, the target's logits, the detokenizer and the tokenizer."""

FUSES = dict(zip((TARGET, MEMORY, DRAFT, NAN, DECODE), ("ABC", "EFG", "HIJ", "LOP", "QRS"), strict=True))
"""After the first character of a fuse come the others, and then what it is for: a fault after some tokens."""

SCHEME_TOP_K = 77
"""Breaks the verification of a request that samples with it."""

_RULES = range(2100)
EXPLODING_GRAMMAR = f'start: "xxxxxx" ({" | ".join(f"r{i}" for i in _RULES)})\n' + "\n".join(
    f'r{i}: "a" r{i} "b" | "{i}"' for i in _RULES
)
"""A grammar that fails after some tokens: its state grows with the text, up to a limit of llguidance."""


def token(character: str) -> int:
    return int(chat_tokenizer()(character)["input_ids"][0])


class FaultyTable(Table):
    """A table that raises errors at some tokens, which no text comes to but by a fuse.

    Args:
        seed: of the table.
        raises: errors by token.
    """

    def __init__(self, seed: int, raises: dict[str, type[Exception]]) -> None:
        super().__init__(seed)
        self._raises = {token(character): error for character, error in raises.items()}
        self._logits[:, [token(character) for character in "".join([*FUSES, *FUSES.values()])]] = -torch.inf
        for mark, fuse in FUSES.items():
            for before, after in zip(fuse, fuse[1:] + mark, strict=True):
                self._logits[token(before)] = -torch.inf
                self._logits[token(before), token(after)] = 0

    def forward(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> ModelOutput:
        for broken, error in self._raises.items():
            if (tokens == broken).any():
                raise error("broken")
        return super().forward(tokens, *args, **kwargs)


def faulty_tokenizer() -> Any:
    tokenizer = chat_tokenizer()
    kind, broken = type(tokenizer), token(DECODE)

    class Faulty(kind):  # type: ignore[misc, valid-type]
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            if ENCODE in text:
                raise RuntimeError("broken")
            return super().__call__(text, *args, **kwargs)

        def decode(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
            if broken in ids:
                raise RuntimeError("broken")
            return super().decode(ids, *args, **kwargs)

    tokenizer.__class__ = Faulty
    return tokenizer


def faulty_engine(max_batch: int) -> mcsd.Engine:
    target = FaultyTable(0, {TARGET: RuntimeError, MEMORY: MemoryError})
    target._logits[token(NAN)] = torch.nan
    draft = FaultyTable(1, {DRAFT: RuntimeError})
    options: dict[str, Any] = {"tree": "2x1", "max_batch": max_batch, "max_length": 4096}
    engine = mcsd.Engine(target, draft, faulty_tokenizer(), **options)
    verify = engine._scheme.verify

    def verified(tree: Any, logits: Any, sampling: Any, *args: Any) -> Any:
        if any(params.top_k == SCHEME_TOP_K for params in sampling.params):
            raise RuntimeError("broken")
        return verify(tree, logits, sampling, *args)

    engine._scheme.verify = verified  # type: ignore[method-assign]
    return engine
