"""Calls of tools in an answer, in the format of Hermes and Qwen: ``<tool_call>{"name", "arguments"}</tool_call>``."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mcsd.params import schema_text
from mcsd.stop_strings import overlap

BEGIN, END = "<tool_call>", "</tool_call>"


def knows_format(chat_template: Any) -> bool:
    """Whether a chat template takes tools and tells the model to call them in this format."""
    return isinstance(chat_template, str) and "tools" in chat_template and BEGIN in chat_template


def calls_grammar(functions: Sequence[Mapping[str, Any]], is_forced: bool, tokenizer: Any) -> str:
    """The grammar (Lark) of answers in which every call fits the schema of its function.

    Args:
        functions: that may be called: ``{"name", "parameters"}``, the latter a JSON schema or None.
        is_forced: whether the answer is one call; otherwise it is text with any number of calls.
        tokenizer: of the target.

    Raises:
        InvalidParameter: a schema is too large or too deep.
    """
    begin, end = (_as_token(mark, tokenizer) for mark in (BEGIN, END))
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    rules = [f"start: {begin or json.dumps(BEGIN)} call" if is_forced else "start: (begin call)* TEXT"]
    rules.append(rf'call: "\n" ({calls}) "\n" {end or json.dumps(END)}')
    if not is_forced:
        # A model that has a token for the mark may write its characters instead.
        rules += [f"begin: written{f' | TEXT {begin}' if begin else ''}", f"written[lazy]: TEXT {json.dumps(BEGIN)}"]
        rules.append(r"TEXT: /(.|\n)*/")
    for index, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        # A schema must not say that its keywords may be ignored.
        schema = (function["parameters"] or {"type": "object"}) | {"x-guidance": {"lenient": False}}
        rules.append(f'call_{index}: {json.dumps(head)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {schema_text(schema)}")
    return "\n".join(rules)


def _as_token(mark: str, tokenizer: Any) -> str:
    """A mark in a grammar as the one token that it is to the model, or ""."""
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return f"<[{ids[0]}]>" if len(ids) == 1 else ""


class ToolCallParser:
    """Finds the calls in a text that comes piece by piece. What only looks like a call stays text.

    Attributes:
        calls: found so far, as ``{"id", "type", "function": {"name", "arguments"}}``; arguments are JSON text.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._held = ""

    def push(self, text: str) -> str:
        """Add a text and return what became final of the text around calls."""
        self._held += text
        final = ""
        while (begin := self._held.find(BEGIN)) >= 0 and (found := self._held.find(END, begin)) >= 0:
            end = found + len(END)
            call = _call(self._held[begin + len(BEGIN) : found])
            if call is None:
                final += self._held[:end]
            else:
                # Line breaks separate calls from the text and from each other.
                final += self._held[:begin].rstrip("\n")
                self.calls.append(call)
            self._held = self._held[end:]
        whole = begin if begin >= 0 else len(self._held) - overlap(self._held, BEGIN)
        text = self._held[:whole].rstrip("\n")
        self._held = self._held[len(text) :]
        return final + text

    def finish(self) -> str:
        """The text that was held back; nothing follows."""
        text, self._held = self._held, ""
        return "" if self.calls and not text.strip() else text


def _call(text: str) -> dict[str, Any] | None:
    """A call from its JSON object; None if it is no call."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = json.dumps(given.get("arguments", {}), ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": given["name"], "arguments": arguments},
    }
