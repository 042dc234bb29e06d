"""Calls in a text that comes piece by piece, wherever it is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcsd.server.tool_calls import ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "</"]}}\n</tool_call>'
TEXTS = [
    ("plain <text> <tool", "plain <text> <tool", 0),
    (CALL, "", 1),
    (f"Sure.\n{CALL}\n{CALL}\n", "Sure.", 2),
    (f"a\n\nb{CALL}c", "a\n\nbc", 1),
    ("<tool_call>no json</tool_call>!", "<tool_call>no json</tool_call>!", 0),
    ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', 0),
    (f"<tool_call>{'[' * 100_000}</tool_call>", f"<tool_call>{'[' * 100_000}</tool_call>", 0),
    ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', 0),
]


def parsed(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser()
    text = "".join(map(parser.push, pieces)) + parser.finish()
    return text, [(call["function"]["name"], call["function"]["arguments"]) for call in parser.calls]


@pytest.mark.parametrize(("text", "rest", "calls"), TEXTS)
def test_calls_are_found_and_other_text_stays(text: str, rest: str, calls: int) -> None:
    assert parsed([text]) == (rest, [("f", json.dumps({"x": [1, "</"]}))] * calls)


@given(st.sampled_from([text for text, _, _ in TEXTS if len(text) < 1000]), st.data())
def test_the_cuts_do_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(pieces) == parsed([text])


def test_a_call_has_an_id_of_its_own() -> None:
    parser = ToolCallParser()
    parser.push(CALL + CALL)
    first, second = (call["id"] for call in parser.calls)
    assert first != second
