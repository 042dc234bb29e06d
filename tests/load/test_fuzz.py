"""Requests that schemathesis makes from the OpenAPI document, valid and not: answers or named refusals, no fault."""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.generation import GenerationMode
from starlette.testclient import TestClient

from mcsd.server import create_app
from support.server import table_engine
from support.threads import LIMIT, wait_for

REQUESTS = int(os.environ.get("MCSD_FUZZ_REQUESTS", "250"))
"""In all; the texts' routes get most of them."""

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
WEIGHTS = {"/v1/chat/completions": 6, "/v1/completions": 6, "/v1/responses": 4, "/tokenize": 2, "/detokenize": 2}
APP = create_app(table_engine(max_length=128), served_name="m", max_completions=4)
SCHEMA = schemathesis.openapi.from_dict(APP.openapi())
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
TOTAL = len(MODES) * sum(WEIGHTS.get(operation.path, 0.5) for operation in OPERATIONS.values())


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(APP, base_url="http://localhost") as client:
        yield client


def check(response: Any, seconds: float) -> None:
    assert response.status_code < 500, response.text
    assert seconds < LIMIT
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"]
        assert error["code"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        assert "server_error" not in response.text
        last = events[-1]
        assert last == "[DONE]" or "error" in json.loads(last) or json.loads(last)["type"].startswith("response.")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_does_harm(label: str, mode: GenerationMode, client: TestClient) -> None:
    operation = OPERATIONS[label]
    count = max(1, round(REQUESTS * WEIGHTS.get(operation.path, 0.5) / TOTAL))

    def send(case: schemathesis.Case) -> None:
        made = case.as_transport_kwargs(base_url="http://localhost")
        body = {{"data": "content"}.get(name, name): made[name] for name in ("json", "data") if name in made}
        began = time.monotonic()
        response = client.request(made["method"], made["url"], params=made["params"], headers=made["headers"], **body)
        check(response, time.monotonic() - began)

    run: Callable[[], None] = seed(count)(
        settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(given(case=operation.as_strategy(mode))(send))
    )
    run()
    engine = APP.state.service.engine
    wait_for(lambda: not engine._running and not engine._waiting)
