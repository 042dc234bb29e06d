"""Structured logs: one JSON object a line. They hold no text of prompts or answers."""

import json
import logging
import sys
import time
from pathlib import Path
from traceback import extract_tb
from typing import Any

_LOGGER = logging.getLogger("mcsd.server")
_MOST_LINES = 8


def log_event(event: str, level: str = "INFO", **fields: Any) -> None:
    """Log an event with its fields."""
    _LOGGER.log(logging.getLevelName(level), event, extra={"fields": fields})


def place_of(error: BaseException) -> dict[str, Any]:
    """The class of an error and the lines that raised it, as fields of an event. Its message may quote a text."""
    lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "lines": lines[-_MOST_LINES:]}


class JsonFormatter(logging.Formatter):
    """A log record as a JSON object. Of libraries it keeps the message; of an exception its class."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname,
            "event": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
        return json.dumps(line | getattr(record, "fields", {}), default=str)


def log_to_stderr() -> None:
    """Write the events of the server, and the warnings of uvicorn, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("mcsd.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
