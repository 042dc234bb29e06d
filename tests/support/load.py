"""Requests of mixed settings, clients that send them at the same time, and the texts that they have alone."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx2 as httpx

import mcsd
from support.threads import LIMIT

Text = tuple[tuple[int, ...], str, str]
"""Token ids, text and finish reason of a choice."""

STOPS = (["\n"], ["e", "zz"], [". ", " the"], ["ab"])
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, "two", None]}, "b": {"type": "boolean"}},
    "required": ["a"],
}
FORMS: tuple[dict[str, Any], ...] = (
    {"regex": "[a-z ]{3,30}[.!]"},
    {"grammar": 'start: line+\nline: /[a-p]+/ ("," | "\\n")'},
    {"json_schema": SCHEMA},
    {"json_object": True},
)
"""Structured output."""


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP; 200 for an error in a stream.
        code: its name.
        retry: the header Retry-After.
    """

    def __init__(self, status: int, code: str | None, retry: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status, self.code, self.retry = status, code, retry


@dataclass(frozen=True)
class Job:
    """A request as the server takes it, and as the engine does.

    Attributes:
        path: of the route.
        body: of the request.
        prompt: a text, or messages.
        fields: sampling parameters of the engine.
        leaves: after how many seconds the client goes away; None: it stays.
    """

    path: str
    body: dict[str, Any]
    prompt: Any
    fields: dict[str, Any]
    leaves: float | None = None

    def alone(self, engine: mcsd.Engine) -> list[Text]:
        """The texts that the engine makes of it."""
        made = engine.chat if self.path.endswith("chat/completions") else engine.generate
        done: Any = made(self.prompt, **self.fields)
        completions = done if isinstance(done, list) else [done]
        return [(each.token_ids, each.text, each.finish_reason) for each in completions]


def job(prompt: str, is_chat: bool = False, **fields: Any) -> Job:
    """A request with some sampling parameters, in the engine's names."""
    messages = [{"role": "user", "content": prompt}]
    body = {"return_token_ids": True} | {name: value for name, value in fields.items() if name != "max_new_tokens"}
    body["max_tokens"] = fields["max_new_tokens"]
    engine_fields = {name: value for name, value in fields.items() if name != "stream"}
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    if "speculative" in body:
        body["speculative"] = {"enabled": body["speculative"]}
    if (schema := body.pop("json_schema", None)) is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    if body.pop("json_object", False):
        body["response_format"] = {"type": "json_object"}
    if is_chat:
        if (count := body.pop("logprobs", None)) is not None:
            body |= {"logprobs": True, "top_logprobs": count}
        return Job("/v1/chat/completions", body | {"messages": messages}, messages, engine_fields)
    return Job("/v1/completions", body | {"prompt": prompt}, prompt, engine_fields)


def mixed_jobs(count: int, seed: int, prompts: Sequence[str], longest: int, cancelled: float = 0.0) -> list[Job]:
    """Requests with settings of all kinds.

    Args:
        count, seed: of them.
        prompts: to choose from.
        longest: the most new tokens.
        cancelled: the share of clients that go away.
    """
    random = Random(seed)
    return [_mixed(random, prompts, longest, cancelled) for _ in range(count)]


def _mixed(random: Random, prompts: Sequence[str], longest: int, cancelled: float) -> Job:
    fields: dict[str, Any] = {
        "max_new_tokens": random.randint(1, longest),
        "temperature": random.choice([0.0, 0.6, 1.0, 1.0, 1.4]),
        "seed": random.getrandbits(63),
        "stream": random.random() < 0.5,
    }
    others: dict[str, Any] = {
        "top_p": random.uniform(0.5, 1),
        "top_k": random.randint(1, 50),
        "min_p": random.uniform(0, 0.2),
        "n": random.randint(2, 3),
        "stop": random.choice(STOPS),
        "presence_penalty": random.uniform(-1, 1),
        "frequency_penalty": random.uniform(-1, 1),
        "repetition_penalty": random.uniform(0.8, 1.3),
        "logprobs": random.randint(0, 5),
        "logit_bias": {random.randrange(200): random.uniform(-5, 5) for _ in range(3)},
        "ignore_eos": True,
        "speculative": False,
    }
    fields |= {name: value for name, value in others.items() if random.random() < 0.25}
    if random.random() < 0.25:
        # A text that never ends has no form.
        fields = fields | random.choice(FORMS) | {"ignore_eos": False}
    made = job(random.choice(prompts), random.random() < 0.5, **fields)
    leaves = random.uniform(0, 0.01 * longest) if random.random() < cancelled else None
    return Job(made.path, made.body, made.prompt, made.fields, leaves)


@asynccontextmanager
async def client_of(url: str, seconds: float = LIMIT) -> AsyncIterator[httpx.AsyncClient]:
    """A client for many requests at the same time, each of which is answered within some seconds."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=seconds) as client:
        yield client


async def answer(client: httpx.AsyncClient, path: str, body: dict[str, Any], pause: float = 0.0) -> list[Text]:
    """The texts that a server makes.

    Args:
        client, path, body: of the request.
        pause: seconds in which a streamed answer is not read.

    Raises:
        Refused: it answers with an error.
    """
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]
            raise Refused(response.status_code, error["code"], response.headers.get("retry-after"))
        if not body.get("stream"):
            choices = json.loads(await response.aread())["choices"]
            return [(tuple(each["token_ids"]), _text(each, "message"), each["finish_reason"]) for each in choices]
        await asyncio.sleep(pause)
        ids: dict[int, list[int]] = {}
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Refused(200, event["error"]["code"])
            for each in event["choices"]:
                index = each["index"]
                ids.setdefault(index, []).extend(each.get("token_ids", ()))
                texts[index] = texts.get(index, "") + _text(each, "delta")
                reasons[index] = each["finish_reason"] or reasons.get(index, "")
        return [(tuple(ids[index]), texts[index], reasons[index]) for index in sorted(ids)]


def _text(choice: dict[str, Any], part: str) -> str:
    return str((choice["text"] if "text" in choice else choice[part].get("content")) or "")


async def run_jobs(client: httpx.AsyncClient, jobs: Sequence[Job], clients: int, done: Any = lambda: None) -> list[Any]:
    """The texts of jobs that several clients take one after the other, in order; None where the client went away.

    Args:
        client, jobs, clients: what to send, and how many at the same time.
        done: called after each.
    """
    results: list[Any] = [None] * len(jobs)
    left = iter(enumerate(jobs))

    async def work() -> None:
        for index, each in left:
            try:
                async with asyncio.timeout(each.leaves):
                    results[index] = await answer(client, each.path, each.body)
            except TimeoutError:
                assert each.leaves is not None, "an answer does not end"
            done()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(work())
    return results
