"""Files of requests and answers of offline batches."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

_OF_ONE_RUN = ("id", "request_id", "created", "created_at", "prompt_tokens_details", "input_tokens_details")
"""Fields with random ids, times, and tokens that an earlier text had in common."""


def request(custom_id: str, url: str, body: Any, method: str = "POST") -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_answers(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def same_parts(value: Any) -> Any:
    """An answer without what differs between two runs."""
    if isinstance(value, dict):
        return {name: same_parts(one) for name, one in value.items() if name not in _OF_ONE_RUN}
    return [same_parts(one) for one in value] if isinstance(value, list) else value
