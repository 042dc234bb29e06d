"""Ray Data: rows get the completions of the engine, and a killed job goes on. Run by `make ray`.

Ray runs in processes of its own, which end with the script that started them.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mcsd.errors import MissingPackage
from support.batches import TEXT, read_answers, request, same_parts, write_lines
from support.threads import wait_for

HERE = Path(__file__).parent
REQUESTS = int(os.environ.get("MCSD_RAY_REQUESTS", "2000"))

needs_ray = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs the extra ray")


@pytest.fixture
def mark() -> Iterator[str]:
    """A value of the environment of all processes of a test. In the end there are none."""
    value = uuid.uuid4().hex
    yield value
    wait_for(lambda: not processes_with(value))


def processes_with(mark: str) -> list[int]:
    """The processes that have this value in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill(mark: str) -> None:
    """SIGKILL to a script and its cluster, as when a machine fails."""
    while found := processes_with(mark):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def start(mark: str, script: str, *words: object) -> subprocess.Popen[str]:
    # Two engines on two cores: one thread each.
    environment = os.environ | {"MCSD_TEST_MARK": mark, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(HERE / script), *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **streams)  # type: ignore[call-overload, no-any-return]


def finish(process: "subprocess.Popen[str]") -> str:
    out, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return out


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mcsd.ray.data", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    import mcsd.ray

    with pytest.raises(MissingPackage, match=r'pip install "mcsd\[ray\]"'):
        _ = mcsd.ray.map_batches


@needs_ray
def test_rows_have_the_completions_of_the_engine(mark: str) -> None:
    assert '{"rows": 10}' in finish(start(mark, "rows.py"))


@needs_ray
def test_a_job_that_is_killed_twice_equals_one_in_one_go(mark: str, tmp_path: Path) -> None:
    """SIGKILL after a quarter and after half of the requests."""
    lines = [
        request(f"r{i}", TEXT, {"prompt": f"{i}. Once upon", "max_tokens": 16, "ignore_eos": True, "seed": i})
        for i in range(REQUESTS)
    ]
    given, whole, parts = write_lines(tmp_path / "in", lines), tmp_path / "whole", tmp_path / "parts"
    began = time.monotonic()
    finish(start(mark, "job.py", given, whole, "smollm2-135m", "2x1"))
    print(f"{REQUESTS} requests in one go: {time.monotonic() - began:.0f} s")

    began = time.monotonic()
    for share in (4, 2):
        process = start(mark, "job.py", given, parts, "smollm2-135m", "2x1")
        wait_for(
            lambda share=share: parts.exists() and parts.read_bytes().count(b"\n") >= REQUESTS // share,  # type: ignore[misc]
            1200,
        )
        kill(mark)
        process.communicate()
        assert parts.read_bytes().count(b"\n") < REQUESTS
    finish(start(mark, "job.py", given, parts, "smollm2-135m", "2x1"))
    print(f"killed twice and resumed: {time.monotonic() - began:.0f} s")

    answers = read_answers(parts)
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(REQUESTS)]
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    assert list(map(same_parts, answers)) == list(map(same_parts, read_answers(whole)))
