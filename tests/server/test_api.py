"""The API with the client of OpenAI over HTTP: the engine's own texts, whole and streamed, and named refusals."""

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest

import mcsd
from mcsd.server import create_app
from mcsd.server.gateway import OPEN_ROUTES
from support.server import Running, running, scripted_engine, table_engine

MODEL = "tabular"
TALK: Any = [{"role": "user", "content": "hello"}]
SEEDED: dict[str, Any] = {"seed": 7, "max_tokens": 40, "temperature": 0.9}
FIELDS: dict[str, Any] = {"seed": 7, "max_new_tokens": 40, "temperature": 0.9}


@pytest.fixture(scope="module")
def engine() -> mcsd.Engine:
    return table_engine()


def test_a_chat_has_the_text_and_the_statistics_of_the_engine(client: openai.OpenAI, engine: mcsd.Engine) -> None:
    own = engine.chat(TALK, **FIELDS)
    done = client.chat.completions.create(model=MODEL, messages=TALK, **SEEDED)
    assert done.choices[0].message.content == own.text
    assert done.choices[0].finish_reason == own.finish_reason
    assert done.usage is not None
    assert done.usage.prompt_tokens == own.stats.prompt_tokens
    assert done.usage.completion_tokens == own.stats.new_tokens
    details = done.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == own.stats.accepted_tokens > 0
    assert details.rejected_prediction_tokens == own.stats.draft_tokens - own.stats.accepted_tokens
    extra = done.usage.model_extra
    assert extra is not None
    assert extra["speculative_decoding"]["acceptance_histogram"] == list(own.stats.acceptance_histogram)
    assert extra["speculative_decoding"]["mean_acceptance_length"] == own.stats.mean_acceptance_length


def test_a_streamed_chat_is_the_same_text_in_pieces(client: openai.OpenAI, engine: mcsd.Engine) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    own = engine.chat(TALK, n=2, **FIELDS)
    chunks = list(client.chat.completions.create(model=MODEL, messages=TALK, **SEEDED, **options))
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [each.text for each in own]
    assert reasons == [each.finish_reason for each in own]
    assert len(chunks) > 10
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == sum(each.stats.new_tokens for each in own)


def test_completions_of_several_prompts(client: openai.OpenAI, engine: mcsd.Engine) -> None:
    prompts, ids = ["one", "two"], {"return_token_ids": True}
    own = [each for prompt in prompts for each in engine.generate(prompt, n=2, **FIELDS)]
    done = client.completions.create(model=MODEL, prompt=prompts, n=2, extra_body=ids, **SEEDED)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.token_ids for choice in done.choices] == [list(each.token_ids) for each in own]  # type: ignore[attr-defined]
    assert [choice.text for choice in done.choices] == [each.text for each in own]
    as_tokens = [engine.tokenizer(prompt)["input_ids"] for prompt in prompts]
    again = client.completions.create(model=MODEL, prompt=as_tokens, n=2, **SEEDED)
    assert [choice.text for choice in again.choices] == [each.text for each in own]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_engine(client: openai.OpenAI, engine: mcsd.Engine, stream: bool) -> None:
    own = engine.chat(TALK, logprobs=3, **FIELDS)
    options: Any = {"logprobs": True, "top_logprobs": 3, "stream": stream}
    done = client.chat.completions.create(model=MODEL, messages=TALK, **SEEDED, **options)
    parts = [choice for chunk in done for choice in chunk.choices] if stream else done.choices
    content = [each for part in parts if part.logprobs for each in part.logprobs.content]
    assert [each.logprob for each in content] == [each.logprob for each in own.logprobs]
    assert [[top.logprob for top in each.top_logprobs] for each in content] == [
        [logprob for _, logprob in each.top] for each in own.logprobs
    ]
    text = b"".join(bytes(each.bytes) for each in content).decode(errors="replace")
    assert text.removesuffix("<|im_end|>") == own.text


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_completions(client: openai.OpenAI, engine: mcsd.Engine, stream: bool) -> None:
    own = engine.generate("one", logprobs=2, temperature=0, max_new_tokens=16)
    options: Any = {"logprobs": 2, "temperature": 0, "stream": stream}
    done = client.completions.create(model=MODEL, prompt="one", **options)
    parts = [choice for chunk in done for choice in chunk.choices] if stream else done.choices
    assert [one for part in parts for one in part.logprobs.token_logprobs] == [each.logprob for each in own.logprobs]
    places = [place for part in parts for place in part.logprobs.text_offset]
    assert places == list(range(16))


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI, engine: mcsd.Engine) -> None:
    # The bias forbids the letter a, the stop string ends at the first line, and extensions have mcsd's names.
    (letter,) = engine.tokenizer("a")["input_ids"]
    fields: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "top_p": 0.9}
    mine = {"top_k": 12, "min_p": 0.01, "repetition_penalty": 1.1}
    own = engine.chat(TALK, stop=["\n"], logit_bias={letter: -100}, **fields, **mine, **FIELDS)
    done = client.chat.completions.create(
        model=MODEL, messages=TALK, stop=["\n"], logit_bias={str(letter): -100}, extra_body=mine, **fields, **SEEDED
    )
    assert done.choices[0].message.content == own.text
    assert "a" not in own.text
    assert own.text != engine.chat(TALK, **FIELDS).text


def test_a_prediction_makes_candidates_and_keeps_the_greedy_text(client: openai.OpenAI, engine: mcsd.Engine) -> None:
    own = engine.chat(TALK, temperature=0, max_new_tokens=30)
    predicted: Any = {"type": "content", "content": own.text}
    done = client.chat.completions.create(
        model=MODEL, messages=TALK, temperature=0, max_completion_tokens=30, prediction=predicted
    )
    assert done.choices[0].message.content == own.text


def test_responses_whole_and_streamed(client: openai.OpenAI, engine: mcsd.Engine) -> None:
    own = engine.chat([{"role": "system", "content": "Be brief."}, *TALK], temperature=0, max_new_tokens=12)
    options: Any = {"instructions": "Be brief.", "temperature": 0, "max_output_tokens": 12, "store": False}
    done = client.responses.create(model=MODEL, input="hello", **options)
    assert done.output_text == own.text
    assert done.status == "incomplete"
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(model=MODEL, input=TALK, stream=True, **options))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == own.text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == own.text


def test_models_tokens_and_version(server: Running, client: openai.OpenAI, engine: mcsd.Engine) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "a ü"}).json()
    assert ids["tokens"] == engine.tokenizer("a ü")["input_ids"]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "a ü"}
    talk = httpx.post(f"{server.url}/tokenize", json={"messages": TALK}).json()
    assert talk["tokens"] == engine.chat_tokens(TALK)
    assert httpx.get(f"{server.url}/version").json() == {"version": mcsd.__version__}


def test_metrics_count_what_clients_are_told() -> None:
    with running(table_engine()) as server, server.client() as client:
        done = client.completions.create(model=MODEL, prompt="one", **SEEDED)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt="one", temperature=3)
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        own = '{engine="0",model_name="tabular"}'
        told: Any = done.usage.model_extra
        told = told["speculative_decoding"]
        assert float(values[f"vllm:spec_decode_num_draft_tokens_total{own}"]) == told["draft_tokens"]
        assert float(values[f"vllm:spec_decode_num_accepted_tokens_total{own}"]) == told["accepted_tokens"]
        assert float(values[f"vllm:spec_decode_num_drafts_total{own}"]) == told["target_calls"]
        per_position = [value for name, value in values.items() if "accepted_tokens_per_pos_total" in name]
        assert sum(map(float, per_position)) == told["accepted_tokens"]
        assert float(values[f"vllm:generation_tokens_total{own}"]) == done.usage.completion_tokens
        assert float(values[f"vllm:num_requests_running{own}"]) == 0
        assert float(values['mcsd:http_responses_total{route="/v1/completions",status="400"}']) == 1


def test_tools_reach_the_template_and_calls_are_parsed() -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    engine = table_engine()
    with running(engine) as server, server.client() as client:
        with_tools = client.chat.completions.create(model=MODEL, messages=TALK, tools=tools, **SEEDED)
        own = engine.chat_tokens(TALK, tools)
        assert with_tools.usage is not None
        assert with_tools.usage.prompt_tokens == len(own) > len(engine.chat_tokens(TALK))
        without = client.chat.completions.create(model=MODEL, messages=TALK, tools=tools, tool_choice="none", **SEEDED)
        assert without.usage is not None
        assert without.usage.prompt_tokens == len(engine.chat_tokens(TALK))


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_parsed(stream: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = '{"name": "weather", "arguments": {"city": "Zürich"}}'
    engine = scripted_engine("Let me look.", "<tool_call>", call, "</tool_call>")
    with running(engine) as server, server.client() as client:
        options: Any = {"model": MODEL, "messages": TALK, "tools": tools, "temperature": 0, "stream": stream}
        done = client.chat.completions.create(**options)
        if stream:
            choices = [choice for chunk in done for choice in chunk.choices]
            text = "".join(choice.delta.content or "" for choice in choices)
            (made,) = (one for choice in choices for one in choice.delta.tool_calls or [])
            assert made.index == 0
            reason = choices[-1].finish_reason
        else:
            (choice,) = done.choices
            text, (made,), reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
        assert text == "Let me look."
        assert reason == "tool_calls"
        assert made.function.name == "weather"
        assert json.loads(made.function.arguments) == {"city": "Zürich"}
        # The conversation goes on with the call and its result, as clients send them back.
        assistant = {"role": "assistant", "content": text, "tool_calls": [made.model_dump(exclude={"index"})]}
        result = {"role": "tool", "tool_call_id": made.id, "content": "rain"}
        options |= {"messages": [*TALK, assistant, result], "stream": False}
        again = client.chat.completions.create(**options)
        assert again.usage.prompt_tokens > len(engine.chat_tokens(TALK, tools)) + 20


def test_a_template_without_tools_refuses_them() -> None:
    engine = table_engine()
    engine.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    with running(engine) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="takes no tools") as refused:
            client.chat.completions.create(model=MODEL, messages=TALK, tools=tools)
        assert refused.value.param == "tools"


REFUSED: list[tuple[str, Any]] = [
    ("temperature", 2.1),
    ("temperature", -0.1),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("n", 129),
    ("max_tokens", 0),
    ("max_tokens", 1 << 40),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", ""),
    ("top_logprobs", 21),
    ("seed", 1 << 70),
    ("response_format", {"type": "xml"}),
    ("functions", []),
    ("reasoning_effort", "low"),
    ("speculative", {"tree": "4x2"}),
    ("speculative", {"scheme": "block"}),
    ("unknown_field", 1),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("tool_choice", "required"),
    ("tool_choice", "sometimes"),
    ("messages", []),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": "user"}]),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_field_that_is_wrong_or_not_supported_is_named(server: Running, name: str, value: Any) -> None:
    body = {"model": MODEL, "messages": TALK, "logprobs": True, name: value}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == name


@pytest.mark.parametrize(
    "name", ["user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier"]
)
def test_fields_without_effect_are_taken(server: Running, name: str) -> None:
    body = {"messages": TALK, "max_tokens": 2, "temperature": 0}
    plain = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | {name: "x"})
    assert answer.status_code == 200
    assert answer.json()["choices"] == plain["choices"]


def test_what_the_engine_has_may_be_named_and_nulls_count_as_left_out(server: Running) -> None:
    body = {"messages": TALK, "max_tokens": 2, "stop": None, "tools": None, "logit_bias": None, "functions": None}
    body |= {"response_format": {"type": "text"}}
    for enabled in (True, False, True):
        body["speculative"] = {"enabled": enabled, "tree": "2x1", "scheme": "mcss-wor"}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200


def test_a_request_may_be_decoded_plainly(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 20, "seed": 3, "return_token_ids": True, "speculative": {"enabled": False}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    plain = table_engine(tree="none").generate("a", max_new_tokens=20, seed=3)
    assert tuple(answer["choices"][0]["token_ids"]) == plain.token_ids
    assert answer["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0
    assert answer["usage"]["speculative_decoding"]["mean_acceptance_length"] == 1


def test_errors_of_the_engine_have_openais_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        client.completions.create(model=MODEL, prompt="")
    with pytest.raises(openai.BadRequestError, match=r"outside \[0, 258\)"):
        client.completions.create(model=MODEL, prompt=[258])


def test_routes_are_listed_and_closed_without_the_key() -> None:
    app = create_app(table_engine(), api_key="secret")
    routes = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    assert routes == {
        *(("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses")),
        *(("POST", path) for path in ("/tokenize", "/detokenize")),
        *(("GET", path) for path in ("/v1/models", "/version", "/health", "/ready", "/metrics", "/openapi.json")),
    }
    with running(table_engine(), api_key="secret") as server:
        for method, path in [*sorted(routes), ("GET", "/unknown")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                status = httpx.request(method, f"{server.url}{path}", headers=headers).status_code
                assert status == (200 if path in OPEN_ROUTES else 401), (path, headers)
        with pytest.raises(openai.AuthenticationError), server.client(api_key="wrong") as client:
            client.models.list()
        with server.client(api_key="secret") as client:
            assert [model.id for model in client.models.list()] == [MODEL]


def test_applications_of_one_process_share_nothing() -> None:
    with running(table_engine(), served_name="one") as first, running(table_engine(), served_name="two") as second:
        assert [first.client().models.list().data[0].id, second.client().models.list().data[0].id] == ["one", "two"]


def test_the_openapi_document_has_the_ranges(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]
    assert fields["additionalProperties"] is False
    assert json.dumps(fields["properties"]["temperature"]["anyOf"][0]) == json.dumps(
        {"type": "number", "maximum": 2.0, "minimum": 0.0}
    )


def test_cors_is_off_unless_named(server: Running) -> None:
    origin = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked = httpx.options(f"{server.url}/v1/completions", headers=origin)
    assert "access-control-allow-origin" not in asked.headers
    with running(table_engine(), cors_origins=["https://page.example"], api_key="secret") as open_one:
        asked = httpx.options(f"{open_one.url}/v1/completions", headers=origin)
        assert asked.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.options(f"{open_one.url}/v1/completions", headers=origin | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
