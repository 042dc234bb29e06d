"""Other inference programs as baselines, each in a process of its own.

A peer is a command that reads requests from stdin and writes answers to stdout, a JSON object a line, until stdin ends:

    {"prompt_token_ids": [1, 5, 7], "seed": 3, "temperature": 1.0, "max_new_tokens": 64}
    {"token_ids": [9, 2, 4], "seconds": 1.25}

``seconds`` is the wall time of the answer, prefill included. A peer samples from the whole vocabulary (no top-k, top-p
or penalties), stops at its end-of-sequence token, and is idle between requests. Examples are in ``benchmarks/peers``.
"""

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from mcsd.errors import InvalidOption

_EXIT_SECONDS = 10.0
"""How long a peer may take to end after its stdin is closed."""


class Peer:
    """A running peer.

    Args:
        name: as tables show it.
        command: how to start it, as a shell would split it; no shell runs it.

    Raises:
        InvalidOption: the command cannot be started.
    """

    def __init__(self, name: str, command: str) -> None:
        self._name = name
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except (OSError, ValueError, IndexError) as error:
            raise InvalidOption(f"peer {name!r:.40} cannot be started: {error}", "check its command") from error

    def answer(self, prompt: list[int], seed: int, temperature: float, max_new_tokens: int) -> tuple[list[int], float]:
        """The new tokens after a prompt, and the seconds they took.

        Raises:
            InvalidOption: the process has ended, or its answer is none.
        """
        request = {"prompt_token_ids": prompt, "seed": seed, "temperature": temperature}
        line = ""
        try:
            print(json.dumps({**request, "max_new_tokens": max_new_tokens}), file=self._process.stdin, flush=True)
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            answer: dict[str, Any] = json.loads(line)
            return [int(token) for token in answer["token_ids"]], float(answer["seconds"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InvalidOption(
                f"peer {self._name!r:.40} gave no answer: {line!r:.80}", "run its command by itself to see why"
            ) from error

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=_EXIT_SECONDS)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            self._process.kill()
            self._process.wait()


@contextmanager
def running_peers(commands: Mapping[str, str]) -> Iterator[dict[str, Peer]]:
    """Start peers, by name, and end them after the block.

    Raises:
        InvalidOption: a command cannot be started.
    """
    with ExitStack() as stack:
        peers = {}
        for name, command in commands.items():
            peers[name] = Peer(name, command)
            stack.callback(peers[name].close)
        yield peers
