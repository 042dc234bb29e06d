"""Requests that schemathesis makes from the OpenAPI document, valid and not: answers or named refusals, no fault."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from math import ceil
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
"""At least so many in all."""

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
MOSTLY_REFUSED = {"model", "regex", "grammar", "tools", "logit_bias"}
"""Fields that the document allows and this engine refuses, whatever is in them. Every second valid body is without."""

WEIGHTS = {"/v1/chat/completions": 3, "/v1/completions": 3, "/v1/responses": 2, "/tokenize": 1, "/detokenize": 1}
APP = create_app(table_engine(max_length=128), served_name="m", max_completions=4)
SCHEMA = schemathesis.openapi.from_dict(APP.openapi())
OPERATIONS = {operation.ok().path: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(APP, base_url="http://localhost") as client:
        yield client


def check(response: Any) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"]
        assert error["code"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert "server_error" not in response.text
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        last = {} if events[-1] == "[DONE]" else json.loads(events[-1])
        assert not last or "error" in last or last["type"] in ("response.completed", "response.incomplete")


def test_routes_without_a_body(client: TestClient) -> None:
    assert set(WEIGHTS) == {path for path, operation in OPERATIONS.items() if operation.body}
    for path in set(OPERATIONS) - set(WEIGHTS):
        check(client.get(path))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", WEIGHTS)
def test_no_body_does_harm(path: str, mode: GenerationMode, client: TestClient) -> None:
    count = ceil(REQUESTS * WEIGHTS[path] / sum(WEIGHTS.values()) / len(MODES))
    statuses: Counter[int] = Counter()
    slowest = 0.0

    def send(case: schemathesis.Case) -> None:
        nonlocal slowest
        made = case.as_transport_kwargs(base_url="http://localhost")
        body = {{"data": "content"}.get(name, name): made[name] for name in ("json", "data") if name in made}
        if mode == GenerationMode.POSITIVE and statuses.total() % 2 and isinstance(body.get("json"), dict):
            body["json"] = {name: value for name, value in body["json"].items() if name not in MOSTLY_REFUSED}
        began = time.monotonic()
        response = client.request(made["method"], made["url"], params=made["params"], headers=made["headers"], **body)
        slowest = max(slowest, time.monotonic() - began)
        statuses[response.status_code] += 1
        check(response)

    limits = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run = seed(count)(limits(given(case=OPERATIONS[path].as_strategy(mode))(send)))
    began = time.monotonic()
    run()
    print(f"{path} {mode.value}: {dict(statuses)}, slowest {slowest:.2f} s, all {time.monotonic() - began:.1f} s")
    assert statuses.total() >= count
    assert slowest < LIMIT
    engine = APP.state.service.engine
    wait_for(lambda: not engine._running and not engine._waiting)
