"""Traces of steps in the chunks of a stream. They exist where the playground is on."""

from collections.abc import Sequence
from typing import Any

from mcsd.server.answers import TokenWriter
from mcsd.server.api_errors import ApiError, unsupported
from mcsd.server.options import ServerOptions
from mcsd.server.schema import ChatRequest, CompletionRequest
from mcsd.step_trace import StepTrace

MAX_CANDIDATES = 256
"""Candidates of one trace, besides those of the accepted path."""
MAX_CHARACTERS = 64
"""Of the text of one token."""


def wants_trace(body: ChatRequest | CompletionRequest, options: ServerOptions) -> bool:
    """Whether the chunks of a request carry traces.

    Raises:
        ApiError: they are off, or the answer is not streamed.
    """
    if body.speculative is None or not body.speculative.trace:
        return False
    name = "speculative.trace"
    if not options.playground:
        raise unsupported(name, f"{name} is off on this server (see --playground)")
    if not body.stream:
        raise ApiError(400, f"{name} needs stream: true", "invalid_value", name)
    return True


def trace_object(trace: StepTrace, emitted: Sequence[str], writer: TokenWriter) -> dict[str, Any]:
    """A step for clients. Nodes without a candidate are left out, and so are candidates beyond `MAX_CANDIDATES`.

    Args:
        trace: of the step.
        emitted: the texts of its tokens; fewer than the path and the target's own token if the text ended before.
        writer: for other tokens.
    """
    there = [node for node, token in enumerate(trace.token_ids) if token is not None]
    # In order of depth, so a parent is kept with its child.
    kept = sorted({*there[:MAX_CANDIDATES], *trace.path})
    number = {node: place for place, node in enumerate(kept)} | {-1: -1}

    def token(id: int, text: str = "") -> dict[str, Any]:
        return {"token_id": id, "text": (text or writer.text_of(id))[:MAX_CHARACTERS]}

    candidates = [
        {"parent": number[trace.parents[node]], **token(*_named(trace, node)), "q": trace.q[node], "p": trace.p[node]}
        for node in kept
    ]
    # What the target would say after the root and after each accepted candidate.
    top = [
        [token(id) | {"q": q, "p": p} for (id, p), q in zip(trace.top[1 + node], trace.top_q[1 + node], strict=True)]
        for node in (-1, *trace.path)
    ]
    return {
        "scheme": trace.scheme,
        "candidates": candidates,
        "omitted": len(there) - len(kept),
        "path": [number[node] for node in trace.path],
        "token": None if trace.token_id is None else token(trace.token_id, trace.piece),
        "top": top,
        "emitted": [text[:MAX_CHARACTERS] for text in emitted],
    }


def _named(trace: StepTrace, node: int) -> tuple[int, str]:
    id = trace.token_ids[node]
    assert id is not None
    return id, trace.pieces[node] if trace.pieces else ""
