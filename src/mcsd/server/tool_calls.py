"""Calls of tools in an answer, in the format of Hermes and Qwen: ``<tool_call>{"name", "arguments"}</tool_call>``."""

import json
import secrets
from typing import Any

from mcsd.stop_strings import overlap

BEGIN, END = "<tool_call>", "</tool_call>"


def knows_format(chat_template: Any) -> bool:
    """Whether a chat template takes tools and tells the model to call them in this format."""
    return isinstance(chat_template, str) and "tools" in chat_template and BEGIN in chat_template


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
