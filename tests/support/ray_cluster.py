"""A cluster of Ray on this machine, and the processes of its replicas."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import torch

import mcsd
from mcsd.models import ModelOutput
from support.server import Table, chat_tokenizer, table_engine
from support.threads import LIMIT

HANG = "Z"
"""A character at which a table hangs that was told to."""


class HangsOnce(Table):
    """A table whose step never ends when it first reads a character; other processes see a file and go on.

    Args:
        mark: the file.
    """

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self._mark = mark
        (self._token,) = chat_tokenizer()(HANG)["input_ids"]
        self._logits[:, self._token] = -torch.inf

    def forward(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> ModelOutput:
        if (tokens == self._token).any() and not self._mark.exists():
            self._mark.touch()
            time.sleep(3600)
        return super().forward(tokens, *args, **kwargs)


def hanging_engine(mark: Path) -> Any:
    """A function that loads an engine which hangs once."""
    return partial(_load, mark)


def _load(mark: Path) -> mcsd.Engine:
    return table_engine(HangsOnce(mark))


@contextmanager
def ray_serve() -> Iterator[str]:
    """Ray Serve on a free port. Yields its address; no process is left at the end."""
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replica_processes(root: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes of engines below a process, by default this one."""
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        try:
            if any(word.startswith("ray::ServeReplica:") and ":engine" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def replicas_of(url: str) -> int:
    """How many replicas a front knows; 0 while it cannot be reached."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/ready")
        return int(json.loads(connection.getresponse().read()).get("replicas", 0))
    except (OSError, ValueError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def wait_until(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    """Wait for what processes do; asked a few times a second, because they share the processor."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def metric(url: str, name: str) -> dict[str, float]:
    """The values of a metric, by its labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith(f"{name}{{")]
    return {labels: float(value) for labels, value in found}
