"""Prompts and conversations in every accepted form."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from mcsd.errors import InvalidParameter
from mcsd.inputs import as_conversations, as_prompts

ONE, TWO = [5, 6, 7], [8, 9, 10]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("given", [ONE, tuple(ONE), torch.tensor(ONE), np.array(ONE), {"input_ids": ONE}, "text"])
def test_one_prompt(given: Any) -> None:
    assert as_prompts(given) == (["text"] if isinstance(given, str) else [ONE], True)


@pytest.mark.parametrize(
    "given",
    [
        [ONE, TWO],
        (ONE, tuple(TWO)),
        torch.tensor([ONE, TWO]),
        [torch.tensor(ONE), np.array(TWO)],
        {"input_ids": torch.tensor([ONE, TWO])},
        BatchEncoding({"input_ids": [ONE, TWO]}),
    ],
)
def test_several_prompts(given: Any) -> None:
    assert as_prompts(given) == ([ONE, TWO], False)
    assert as_prompts(given[:1] if not hasattr(given, "items") else {"input_ids": [ONE]}) == ([ONE], False)


def test_texts_and_nothing() -> None:
    assert as_prompts(["a", ONE]) == (["a", ONE], False)
    assert as_prompts([]) == ([], False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_padding_is_removed_by_the_attention_mask(side: str, kind: Any) -> None:
    ids, mask = ([[0, 0, *ONE[:1]], TWO], [[0, 0, 1], [1, 1, 1]])
    if side == "right":
        ids, mask = [row[::-1] for row in ids], [row[::-1] for row in mask]
    kept = [ONE[:1], ids[1]]
    assert as_prompts(BatchEncoding({"input_ids": kind(ids), "attention_mask": kind(mask)}), 0) == (kept, False)


KINDS = [
    list,
    tuple,
    torch.tensor,
    np.array,
    lambda ids: {"input_ids": torch.tensor(ids)},
    lambda ids: {"input_ids": ids},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ids", [[[0, 0, 5], TWO], [[0, 5, 6], TWO], [[5, 6, 0], TWO], [[5, 0, 0]], [[0, 0, 5], [0, 0, 6]]]
)
def test_padding_without_a_mask_is_refused(kind: Any, ids: Any) -> None:
    """Some of several rows of one length, or more than one at an end of any."""
    with pytest.raises(InvalidParameter, match="padded with token 0"):
        as_prompts(kind(ids), 0)
    assert as_prompts(kind(ids), 1) == as_prompts(kind(ids)) == (ids, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_also_the_padding(kind: Any) -> None:
    # Every prompt may begin with one token, which may be the tokenizer's padding, too.
    assert as_prompts(kind([[0, 5], [0, 6]]), 0) == ([[0, 5], [0, 6]], False)
    assert as_prompts(kind([[0, 5]]), 0) == ([[0, 5]], False)
    assert as_prompts(kind([[5, 0, 0, 6], TWO + ONE[:1]]), 0)[0] == [[5, 0, 0, 6], [*TWO, 5]]
    assert as_prompts([[5, 0], TWO, "text"], 0) == ([[5, 0], TWO, "text"], False)  # Of different lengths.
    with pytest.raises(InvalidParameter, match="padded with token 0"):
        as_prompts([5, 0, 0], 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "neither a text nor token ids"),
        ({"ids": ONE}, "neither a text nor token ids"),
        (HELLO, "use engine.chat"),
        ({"input_ids": [ONE], "attention_mask": [[1]]}, "differ in shape"),
        ({"input_ids": ONE, "attention_mask": 1}, "differ in shape"),
        ({"input_ids": [ONE, TWO], "attention_mask": [1, 1]}, "differ in shape"),
        ({"input_ids": 5}, "input_ids=5 is not a list"),
        (torch.tensor(5), "neither a text nor token ids"),
        (b"hello", "neither a text nor token ids"),
    ],
)
def test_other_forms_are_refused(given: Any, said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        as_prompts(given)


def test_conversations() -> None:
    assert as_conversations(HELLO) == ([HELLO], True)
    assert as_conversations("hello") == ([HELLO], True)
    assert as_conversations([HELLO, HELLO * 3]) == ([HELLO, HELLO * 3], False)
    for wrong in ([], 3, ["hello"], [HELLO, "hello"], [[HELLO[0]], 3]):
        with pytest.raises(InvalidParameter, match="not a conversation"):
            as_conversations(wrong)
