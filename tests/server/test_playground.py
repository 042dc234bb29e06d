"""The server side of the playground: traces in chunks and the files of the page; and refusals where it is off."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

import mcsd
from mcsd import errors
from mcsd.server import ListenOptions, ServerOptions, create_app
from mcsd.server.options import has_playground
from mcsd.server.page import FILES
from mcsd.server.traces import MAX_CANDIDATES
from support.server import Running, Table, running, table_engine

TALK: Any = [{"role": "user", "content": "hello"}]
BODY: dict[str, Any] = {"seed": 7, "max_tokens": 40, "temperature": 0.9, "stream": True}
TRACED = BODY | {"speculative": {"trace": True}}
PATHS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": TALK}),
    ("/v1/completions", {"prompt": "one"}),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(table_engine(tree="3x2"), playground=True) as server:
        yield server


def choices(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = httpx.post(f"{server.url}{path}", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    return [choice for event in events for choice in event["choices"]]


def text_of(parts: list[dict[str, Any]]) -> str:
    return "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in parts)


@pytest.mark.parametrize(("path", "prompt"), PATHS)
def test_a_traced_stream_has_the_text_of_the_seed_and_the_steps_of_the_engine(
    server: Running, path: str, prompt: dict[str, Any]
) -> None:
    plain = choices(server, path, prompt | BODY)
    traced = choices(server, path, prompt | TRACED)
    assert text_of(traced) == text_of(plain)
    assert not any("trace" in each for each in plain)
    found = [each["trace"] for each in traced if "trace" in each]
    engine = table_engine(tree="3x2")
    fields: dict[str, Any] = {"seed": 7, "max_new_tokens": 40, "temperature": 0.9, "trace": True}
    own = engine.stream_chat(TALK, **fields) if "messages" in prompt else engine.stream("one", **fields)
    chunks = list(own)
    assert len(found) == len(chunks)
    for trace, chunk in zip(found, chunks, strict=True):
        expected = chunk.trace
        assert expected is not None
        assert trace["scheme"] == "mcss-wor"
        assert [each["parent"] for each in trace["candidates"]] == list(expected.parents)
        assert [each["token_id"] for each in trace["candidates"]] == list(expected.token_ids)
        assert [each["q"] for each in trace["candidates"]] == list(expected.q)
        assert [each["p"] for each in trace["candidates"]] == list(expected.p)
        assert [each["text"] for each in trace["candidates"]] == list(expected.pieces)
        assert trace["path"] == list(expected.path)
        assert trace["token"]["token_id"] == expected.token_id
        nodes = [0, *(1 + node for node in expected.path)]
        assert [[(each["token_id"], each["p"]) for each in top] for top in trace["top"]] == [
            list(expected.top[node]) for node in nodes
        ]
        assert [[each["q"] for each in top] for top in trace["top"]] == [list(expected.top_q[node]) for node in nodes]
        assert trace["emitted"] == list(chunk.pieces)
        assert trace["omitted"] == 0


def test_a_request_without_speculation_has_steps_without_candidates(server: Running) -> None:
    body = TRACED | {"messages": TALK, "speculative": {"trace": True, "enabled": False}}
    traces = [each["trace"] for each in choices(server, "/v1/chat/completions", body) if "trace" in each]
    assert len(traces) > 10
    for trace in traces:
        assert trace["candidates"] == trace["path"] == []
        assert trace["omitted"] == 0
        assert len(trace["top"]) == 1


def test_a_trace_is_bounded_and_keeps_the_accepted_path() -> None:
    # A chain of 130 candidates, each with two siblings. Draft and target are equal, so the whole chain is accepted.
    depth = 130
    parents = [3 * (level - 1) if level else -1 for level in range(depth) for _ in range(3)]
    body = TRACED | {"prompt": "one", "max_tokens": depth + 1, "top_k": 20, "ignore_eos": True}
    with running(table_engine(Table(seed=1), tree=parents), playground=True) as server:
        (trace,) = [each["trace"] for each in choices(server, "/v1/completions", body)]
    assert len(trace["path"]) == depth
    beyond = sum(3 * level >= MAX_CANDIDATES for level in range(depth))
    assert len(trace["candidates"]) == MAX_CANDIDATES + beyond
    assert trace["omitted"] == len(parents) - MAX_CANDIDATES - beyond > 0
    assert [trace["candidates"][node]["parent"] for node in trace["path"]] == [-1, *trace["path"][:-1]]
    assert [trace["candidates"][node]["text"] for node in trace["path"][:3]] == trace["emitted"][:3]
    assert all(each["parent"] < index for index, each in enumerate(trace["candidates"]))


def test_a_traced_request_changes_no_other_text_and_is_counted_as_any(server: Running) -> None:
    def counted() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "seconds" not in line)
        return {name: float(value) for name, value in pairs if "created" not in name}

    def added(before: dict[str, float]) -> dict[str, float]:
        return {name: value - before.get(name, 0) for name, value in counted().items()}

    start = counted()
    choices(server, "/v1/completions", BODY | {"prompt": "one"})
    plain, middle = added(start), counted()
    choices(server, "/v1/completions", TRACED | {"prompt": "one"})
    traced = added(middle)
    cached = {name for name in plain if "cached" in name}
    assert {name: value for name, value in traced.items() if name not in cached} == {
        name: value for name, value in plain.items() if name not in cached
    }
    with running(table_engine(tree="3x2"), playground=True) as fresh:
        alone = text_of(choices(fresh, "/v1/completions", BODY | {"prompt": "two"}))
        beside = fresh.engine.stream("one", trace=True, max_new_tokens=2000, ignore_eos=True)
        next(beside)
        assert text_of(choices(fresh, "/v1/completions", BODY | {"prompt": "two"})) == alone
        beside.close()


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", TRACED | {"messages": TALK, "stream": False}, "needs stream"),
        ("/v1/completions", TRACED | {"prompt": "x", "stream": False}, "needs stream"),
        ("/v1/responses", {"input": "x", "stream": True, "speculative": {"trace": True}}, "not supported"),
        ("/v1/completions", BODY | {"prompt": "x", "speculative": {"trace": 1}}, "speculative.trace"),
    ],
)
def test_a_trace_that_no_chunk_can_carry_is_refused(
    server: Running, path: str, body: dict[str, Any], message: str
) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "speculative.trace"
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("option", [None, False])
def test_where_the_playground_is_off_traces_are_refused_and_there_is_no_page(option: bool | None) -> None:
    with running(table_engine(), playground=option, api_key="secret") as server:
        for path in FILES:
            assert httpx.get(f"{server.url}{path}").status_code == 404
        key = {"Authorization": "Bearer secret"}
        for path, prompt in PATHS:
            answer = httpx.post(f"{server.url}{path}", json=TRACED | prompt, headers=key)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "speculative.trace")
            assert "--playground" in answer.json()["error"]["message"]
            allowed = prompt | {"max_tokens": 1, "speculative": {"trace": False}}
            assert httpx.post(f"{server.url}{path}", json=allowed, headers=key).status_code == 200


@pytest.mark.parametrize(
    ("host", "given", "on"),
    [
        *((host, None, True) for host in ("127.0.0.1", "::1", "localhost")),
        *((host, None, False) for host in ("0.0.0.0", "::", "192.168.0.5", "llm.example.com")),
        ("0.0.0.0", True, True),
        ("127.0.0.1", False, False),
    ],
)
def test_by_default_the_playground_is_on_where_only_this_machine_can_connect(
    host: str, given: bool | None, on: bool
) -> None:
    assert has_playground(ServerOptions(playground=given), ListenOptions(host=host)) is on


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(errors.InvalidOption, match="playground='yes'"):
        create_app(table_engine(), playground="yes")


def test_the_page_needs_no_key_and_its_data_does() -> None:
    with running(table_engine(), playground=True, api_key="secret") as server:
        for path in FILES:
            answer = httpx.get(f"{server.url}{path}")
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(f"{server.url}/").headers["content-type"].startswith("text/html")
        assert httpx.get(f"{server.url}/playground/app.js").headers["content-type"].startswith("text/javascript")
        for path in ("/v1/models", "/playground/", "/playground/../app.py", "/playground/index.html"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
        assert httpx.get(f"{server.url}/", headers={"Host": "evil.example"}).status_code == 400


def test_the_routes_of_the_page_are_those_of_its_files() -> None:
    plain, page = (
        {route.path for route in create_app(table_engine(), playground=option).routes}  # type: ignore[attr-defined]
        for option in (False, True)
    )
    assert page - plain == set(FILES)
    names = {"style.css", "icon.svg"} | {
        f"{name}.js" for name in ("api", "app", "clock", "compare", "dom", "explain", "stepper", "steps", "tree")
    }
    assert set(FILES) == {"/"} | {f"/playground/{name}" for name in names}
    document = create_app(table_engine(), playground=True).openapi()
    assert not set(document["paths"]) & set(FILES)


def test_the_files_of_the_page_name_no_other_host_and_no_html() -> None:
    for file in FILES.values():
        text = file.read_text()
        assert len(text.splitlines()) <= 400
        addresses = {word for word in text.replace('"', " ").split() if "://" in word}
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name
        for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
            assert name not in text, file.name


def test_the_files_of_the_page_are_package_data() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    package = Path(mcsd.__file__).parent
    listed = {file for glob in project["tool"]["setuptools"]["package-data"]["mcsd"] for file in package.glob(glob)}
    assert set(FILES.values()) <= listed


def test_the_model_tells_its_draft_tree_and_scheme(server: Running) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["speculative"] == {"draft": "tabular", "tree": "3x2", "scheme": "mcss-wor"}
