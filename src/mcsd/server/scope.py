"""Requests to the server's application that come by no network of its own."""

from collections.abc import Iterable

from starlette.types import Scope


def http_scope(method: str, path: str, headers: Iterable[tuple[bytes, bytes]], query: bytes = b"") -> Scope:
    """The ASGI scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": list(headers),
        "client": None,
        "server": None,
    }
