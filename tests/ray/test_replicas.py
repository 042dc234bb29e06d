"""Replicas of a table behind Ray's own proxy: their texts, their ends, updates and metrics."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

pytest.importorskip("ray.serve", reason="the extra mcsd[ray] is not installed")

from ray import serve

import mcsd.ray
from mcsd.errors import InvalidOption
from support.load import Refused, answer, client_of, job, mixed_jobs, run_jobs
from support.ray_cluster import HANG, hanging_engine, metric, ray_serve, replica_processes, replicas_of, wait_until
from support.server import table_engine
from support.threads import LIMIT

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]  # Those of Ray.

PROMPTS = ("abc", "hello there", "a\nb\nc", "x" * 60)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ray_serve() as url:
        start(url, max_waiting=200)
        yield url


def start(url: str, target: Any = table_engine, **options: Any) -> None:
    serve.run(mcsd.ray.deployment(target, num_replicas=2, **options))
    wait_until(lambda: replicas_of(url) == 2, 2 * LIMIT)


def test_texts_are_those_of_one_engine_and_a_lost_replica_harms_only_its_streams(url: str) -> None:
    jobs = mixed_jobs(16, seed=1, prompts=PROMPTS, longest=30)
    long = [job(f"a{number}", seed=number, max_new_tokens=250, ignore_eos=True, stream=True) for number in range(20)]

    async def load() -> Any:
        async with client_of(url, 2 * LIMIT) as client:
            mixed = await run_jobs(client, jobs, 8)
            streams = [asyncio.create_task(answer(client, each.path, each.body)) for each in long]
            await asyncio.sleep(0.5)
            random.Random(0).choice(replica_processes()).kill()
            return mixed, await asyncio.gather(*streams, return_exceptions=True)

    mixed, streamed = asyncio.run(load())
    engine = table_engine()
    assert mixed == [each.alone(engine) for each in jobs]
    lost = [each for each in streamed if isinstance(each, BaseException)]
    assert all(isinstance(each, Refused) and (each.status, each.code) == (200, "replica_lost") for each in lost), lost
    assert 0 < len(lost) < len(long)
    kept = [(each, text) for each, text in zip(long, streamed, strict=True) if not isinstance(text, Refused)]
    alone: Any = engine.generate([each.prompt for each, _ in kept], [each.fields for each, _ in kept])
    assert [text[0][0] for _, text in kept] == [done.token_ids for done in alone]
    wait_until(lambda: replicas_of(url) == 2 and len(replica_processes()) == 2, LIMIT)
    (losses,) = [
        count for labels, count in metric(url, "mcsd:replica_losses_total").items() if 'begun="true"' in labels
    ]
    assert losses == len(lost)


def test_metrics_of_all_replicas_have_one_address(url: str) -> None:
    for seed in range(12):
        httpx.post(
            f"{url}/v1/completions", json={"prompt": f"{seed}", "max_tokens": 4, "seed": seed}
        ).raise_for_status()
    tokens = metric(url, "vllm:generation_tokens_total")
    assert len(tokens) == 2
    assert sum(tokens.values()) >= 12
    assert len(metric(url, "vllm:num_requests_running")) == 2
    (answers,) = [
        count for labels, count in metric(url, "mcsd:http_responses_total").items() if "/v1/completions" in labels
    ]
    assert answers >= 12
    text = httpx.get(f"{url}/metrics").text
    assert text.count("# TYPE vllm:generation_tokens_total counter") == 1


def test_requests_of_a_conversation_meet_on_one_replica(url: str) -> None:
    before = metric(url, "vllm:request_success_total")
    talk = [{"role": "user", "content": "hello"}]
    for _ in range(8):
        body = {"messages": talk, "max_tokens": 4, "temperature": 0}
        made = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=LIMIT).json()["choices"][0]["message"]
        talk += [{"role": "assistant", "content": made["content"] or "x"}, {"role": "user", "content": "and?"}]
    after = metric(url, "vllm:request_success_total")
    grown = {labels.split('engine="')[1].split('"')[0] for labels in after if after[labels] > before.get(labels, 0)}
    assert len(grown) == 1


def test_a_client_that_goes_away_frees_its_replica(url: str) -> None:
    body = {"prompt": "x", "max_tokens": 3900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LIMIT) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert sum(metric(url, "vllm:num_requests_running").values()) == 1
    wait_until(lambda: sum(metric(url, "vllm:num_requests_running").values()) == 0)


def test_an_update_loses_no_request(url: str) -> None:
    before = {process.pid for process in replica_processes()}

    async def load() -> list[Any]:
        texts: list[Any] = []
        async with client_of(url, 2 * LIMIT) as client:
            update = asyncio.create_task(asyncio.to_thread(start, url, max_waiting=201))
            seed = 0
            while not update.done():
                seed += 1
                each = job("abc", seed=seed, max_new_tokens=20, stream=seed % 2 == 0)
                texts.append((each, await answer(client, each.path, each.body)))
            await update
        return texts

    texts = asyncio.run(load())
    engine = table_engine()
    assert len(texts) > 10
    assert all(text == each.alone(engine) for each, text in texts)
    wait_until(lambda: before.isdisjoint(process.pid for process in replica_processes()), LIMIT)


def test_a_replica_whose_step_hangs_is_replaced_and_its_requests_move(url: str, tmp_path: Path) -> None:
    start(url, hanging_engine(tmp_path / "hung"), step_seconds=2.0, api_key="k")
    headers = {"Authorization": "Bearer k"}
    body = {"prompt": HANG, "max_tokens": 5, "seed": 1, "stream": True}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
    before = {process.pid for process in replica_processes()}
    answered = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=LIMIT)
    assert answered.text.endswith("data: [DONE]\n\n")
    assert (tmp_path / "hung").exists()

    def replaced() -> bool:
        now = {process.pid for process in replica_processes() if process.status() != psutil.STATUS_ZOMBIE}
        return replicas_of(url) == 2 and len(before & now) == 1 and len(now) == 2

    wait_until(replaced, 2 * LIMIT)


def test_replicas_follow_the_load_and_metrics_are_those_of_all_fronts(url: str) -> None:
    scale = {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 1, "upscale_delay_s": 0.5}
    scale |= {"metrics_interval_s": 0.5, "look_back_period_s": 2.0}
    serve.run(mcsd.ray.deployment(table_engine, autoscaling_config=scale, num_fronts=2))
    wait_until(lambda: replicas_of(url) == 2, 2 * LIMIT)
    body = {"prompt": "x", "max_tokens": 3900, "ignore_eos": True, "stream": True}
    with ExitStack() as streams:
        for _ in range(6):
            streams.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LIMIT))
        wait_until(lambda: replicas_of(url) == 3, LIMIT)
    fronts = metric(url, "mcsd:replicas")
    assert len(fronts) == 2
    assert all('front="' in labels and 'front=""' not in labels for labels in fronts)


def test_wrong_options_have_names() -> None:
    for options, error in (
        ({"num_replicas": -1}, "num_replicas=-1"),
        ({"num_gpus": 2}, "num_gpus=2"),
        ({"num_fronts": 0}, "num_fronts=0"),
        ({"max_waitin": 1}, "'max_waitin' is not an option"),
        ({"target": table_engine, "tree": "2x1"}, "and tree"),
    ):
        with pytest.raises(InvalidOption, match=error):
            mcsd.ray.deployment(**options)  # type: ignore[arg-type]
