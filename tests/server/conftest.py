"""A server of a table on a free port, and the client of OpenAI for it."""

from collections.abc import Iterator

import openai
import pytest

from support.server import Running, running, table_engine


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(table_engine()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
