"""Servers on free ports, clients of them, and engines that are fast and have text."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
import torch
from fastapi import FastAPI

import mcsd
from mcsd.models import ModelOutput
from mcsd.server import ListenOptions, create_app
from mcsd.server.listen import DrainingServer, make_server
from mcsd.testing import TabularModel
from support.small_tokenizers import byte_level
from support.threads import LIMIT, wait_for

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "Answer with <tool_call> and </tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")


def chat_tokenizer() -> Any:
    """A tokenizer with a token for each byte, control tokens, and the chat template of Qwen in short."""
    tokenizer = byte_level([])
    tokenizer.add_special_tokens({"eos_token": SPECIAL[1], "additional_special_tokens": [SPECIAL[0]]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Table(TabularModel):
    """A table over bytes that prefers letters, with something to do before every forward."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = len(chat_tokenizer())
        weights = torch.rand(size, size, generator=generator) ** 4 + 1e-4
        letters = chat_tokenizer()("abcdefghij klmnop\n")["input_ids"]
        weights[:, letters] *= 50
        super().__init__(weights / weights.sum(-1, keepdim=True))
        self.before: Callable[[], object] = lambda: None

    def forward(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> ModelOutput:
        self.before()
        return super().forward(tokens, *args, **kwargs)


def table_engine(target: TabularModel | None = None, **options: Any) -> mcsd.Engine:
    options = {"tree": "2x1", "max_length": 4096, "max_batch": 4} | options
    return mcsd.Engine(target or Table(), Table(seed=1), chat_tokenizer(), **options)


def scripted_engine(*pieces: str) -> mcsd.Engine:
    """An engine that answers every conversation with these pieces; each is a token of its own."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(list(pieces))
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    assert len(set(ids)) == len(ids)
    size = len(tokenizer)
    table = torch.zeros(size, size)
    table[:, ids[0]] = 1  # Also after the line break at the end of the template.
    for before, after in zip(ids, [*ids[1:], tokenizer.eos_token_id], strict=True):
        table[before] = torch.nn.functional.one_hot(torch.tensor(after), size)
    return mcsd.Engine(TabularModel(table), TabularModel(table), tokenizer, tree="chain:2", max_length=4096)


class Running:
    """A server in a thread of its own."""

    def __init__(self, app: FastAPI, **listen: Any) -> None:
        self.app = app
        self.url = ""
        self.server: DrainingServer = make_server(app, ListenOptions(port=0, **listen), self._listens)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        assert self._ready.wait(LIMIT)

    def _listens(self, url: str) -> None:
        self.url = url
        self._ready.set()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def engine(self) -> mcsd.Engine:
        engine: mcsd.Engine = self.app.state.service._engine.engine
        return engine

    @property
    def status(self) -> Any:
        return self.app.state.service._engine.status

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": LIMIT} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def idle(self) -> None:
        """Wait until no sequence is in use."""
        wait_for(lambda: self.status[:2] == (0, 0) and not self.engine._running)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the server does not end"


@contextmanager
def running(engine: Any, listen: dict[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    server = Running(create_app(engine, **options), **(listen or {}))
    try:
        yield server
    finally:
        server.stop()
    served = server.app.state.service._engine
    assert served is None or not served.leaked_sequences


def raw(address: tuple[str, int], data: bytes | Sequence[bytes], seconds: float = 10.0) -> bytes:
    """What a server answers to bytes, until it closes the connection or is silent for a time."""
    with socket.create_connection(address, timeout=seconds) as connection:
        for part in [data] if isinstance(data, bytes) else data:
            try:
                connection.sendall(part)
            except OSError:
                break
        answer = b""
        try:
            while received := connection.recv(1 << 16):
                answer += received
        except OSError:
            pass
        return answer


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    """The bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    lines += (
        [f"Content-Length: {len(body)}"]
        if not any(line.startswith(("Content-L", "Transfer")) for line in headers)
        else []
    )
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode() + body
