"""`mcsd bench` on the command line: tables, JSON, wrong options, a killed process."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mcsd.cli.bench import TREES, BenchModelArguments, ExperimentArguments, _command, _prompts
from support.cli import Run, assert_one_line_error, start

SMALL = ("--each", 2, "-n", 6, "--dtype", "float32")
SYSTEMS = 3
"""Plain decoding, generate and a tree."""


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "asked.txt"
    path.write_text("How are you?\nWho are you?\nWhere are you?\n")
    return path


def test_a_table_and_a_report(run: Run, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("bench", "-m", tiny, "-md", tiny, "--out", out, "--trees", "2x1", "--trees", "parents:-1,-1", *SMALL)
    result = run(
        *words, "--prompts", f"mine={prompts}", "--baselines", "generate,lookup,assisted", "--temperatures", "0"
    )
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[-1] == str(out / "report.html")
    assert lines[-2].startswith("temperature 0: ")
    systems = [line["system"] for line in lines_of(out / "requests.jsonl")]
    assert sorted(set(systems)) == ["2 mcss-wor", "2x1 mcss-wor", "assisted", "generate", "lookup", "plain"]
    # The draft is the target: everything it proposes is accepted, and all texts are the same.
    texts = {json.dumps([line["numbers"], line["token_ids"]]) for line in lines_of(out / "requests.jsonl")}
    assert len(texts) == 2
    assert all(line["within"][0] == line["tried"] for line in lines_of(out / "acceptance.jsonl"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["prompts"]["mine"]["count"] == 2
    assert set(manifest["digests"]["target"]) == {"model.safetensors"}
    assert len(manifest["digests"]["target"]["model.safetensors"]) == 64
    assert "--trees 2x1 --trees parents:-1,-1" in manifest["command"]


def test_plain_decoding_and_generate_are_the_default_baselines(
    run: Run, tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    """The default trees and temperatures: speed comes first, in lines of at most 100 columns."""
    words = ("bench", "-m", tiny, "-md", tiny, "--out", tmp_path / "out", *SMALL, "--prompts", prompts)
    result = run(*words, "--each", 3)
    assert (result.code, result.err) == (0, "")
    report = str(tmp_path / "out" / "report.html")
    lines = result.out.removesuffix(f"{report}\n").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("speed")
    head = "× GENERATE", "× PLAIN", "LOW", "HIGH", "TOKENS/STEP", "ACCEPTED"
    assert re.split("  +", lines[1]) == ["TEMP", "SYSTEM", "TOKENS/S", *head]
    systems = [*("plain", "generate"), *(f"{tree} mcss-wor" for tree in TREES.split(","))]
    assert [line[4:].strip().partition("  ")[0] for line in lines[2:12]] == systems * 2
    titles = ("speed", "acceptance of one of the first k", "a forward of the target", "temperature 1: fastest is")
    found = [next(i for i, line in enumerate(lines) if line.startswith(title)) for title in titles]
    assert found == sorted(found)
    # On tiny models `generate` may be the fastest, which is not compared with itself.
    assert "× generate" in result.out or result.out.count("fastest is generate") == 2


def test_json_is_one_object(run: Run, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    words = ("bench", "-m", tiny, "-md", "ngram", "--out", tmp_path / "out", "--trees", "2x1", *SMALL)
    result = run(*words, "--prompts", prompts, "--batch-sizes", "2", "--json")
    assert (result.code, result.err) == (0, "")
    (line,) = result.out.splitlines()
    value = json.loads(line)
    assert list(value) == ["verdict", "speeds", "acceptances", "attentions", "left_out", "report"]
    assert value["left_out"] == {"generate": "it answers one prompt at a time, and there are no batches of one"}
    assert {row["batch"] for row in value["speeds"]} == {2}
    assert {row["prompts"] for row in value["speeds"]} == {"asked"}
    assert {row["scheme"] for row in value["acceptances"]} == {"top-k"}


def test_a_peer(run: Run, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text('for line in open(0): print(\'{"token_ids": [1, 2], "seconds": 0.1}\', flush=True)')
    words = ("bench", "-m", tiny, "-md", "ngram", "--out", tmp_path / "out", "--trees", "2x1", *SMALL)
    peer = f"other={sys.executable} {script}"
    result = run(*words, "--prompts", prompts, "--temperatures", 0, "--peer", peer, "--json")
    assert (result.code, result.err) == (0, "")
    rates = {row["system"]: row["tokens_per_second"] for row in json.loads(result.out)["speeds"]}
    assert rates["other"] == pytest.approx(20)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "--peer 'other=" in manifest["command"]


def test_the_paper(run: Run, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("bench", "--paper", "-m", tiny, "-md", tiny, "--tuned-draft", tiny, "--out", out, "--prompts", prompts)
    result = run(*words, "--each", 1, "-n", 4, "--dtype", "float32", "--json")
    assert (result.code, result.err) == (0, "")
    value = json.loads(result.out)
    systems = {row["system"] for row in value["speeds"]}
    assert {
        "plain",
        "generate",
        "assisted",
        "chain:3 mcss-wor",
        "4x2x2x1 mcss-wor",
        "2x2x1 mcss",
        "2x2x1 naive",
    } <= systems
    assert {row["tree"] for row in value["attentions"]} >= {"2x2x1", "4x2x2x1", "8"}
    assert {row["draft"] for row in value["acceptances"]} == {"draft", "tuned"}
    # The draft is the target: its argmax is the target's.
    assert {row["k1"] for row in value["acceptances"] if row["temperature"] == 0} == {1.0}


def test_a_killed_process_loses_the_request_in_flight(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("bench", "-m", tiny, "-md", tiny, "--out", out, "--trees", "2x1", *SMALL, "--prompts", prompts)
    words += ("--repeats", 6, "--temperatures", "0")
    log = out / "requests.jsonl"
    process = start(*words)
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = log.read_text()
    whole = before[: before.rindex("\n") + 1]
    assert len(whole.splitlines()) < 6 * 2 * SYSTEMS
    log.write_text(whole + '{"system": "pla')
    process = start(*words, "--json")
    output, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, "")
    after = log.read_text()
    assert after.startswith(whole)
    entries = lines_of(log)
    keys = {(e["system"], e["prompts"], tuple(e["numbers"]), e["temperature"], e["repeat"]) for e in entries}
    assert len(entries) == len(keys) == 6 * 2 * SYSTEMS
    assert {row["requests"] for row in json.loads(output)["speeds"]} == {12}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--out"),
        ("--out x --trees 2y", "2y"),
        ("--out x --trees 2x1 --schemes block", "supports chains"),
        ("--out x --schemes best", "scheme 'best'"),
        ("--out x --baselines fast", "baseline 'fast'"),
        ("--out x --temperatures 0,warm", "temperatures=0,warm"),
        ("--out x --temperatures -1", "temperatures"),
        ("--out x --batch-sizes 1.5", "batch_sizes=1.5"),
        ("--out x --batch-sizes 0", "batch_sizes"),
        ("--out x --each 0", "each=0"),
        ("--out x -n 0", "max_new_tokens=0"),
        ("--out x --repeats 0", "repeats=0"),
        ("--out x --seed -1", "seed=-1"),
        ("--out x --prompts no/such", "no/such"),
        ("--out x --paper --trees 2x1", "--paper brings its own trees"),
        ("--out x --target smollm-135", "no model 'smollm-135'"),
        ("--out x --dtype int7", "int7"),
        ("--out x --quantize nope", "nope"),
        ("--out x --baselines assisted -md ngram", "'ngram' is no model"),
        ("--out x --baselines assisted", "'smollm2-135m-head' is no model"),
        ("--out x --batch-sizes 5", "batches of 5"),
        ("--out x --peer other", "peer 'other'"),
        ("--out x --peer plain=true", "peer 'plain' has the name of another system"),
        ("--out x --peer a=true --peer a=false", "peer 'a=false': given twice"),
    ],
)
def test_wrong_options(words: str, said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run("bench", *words.split()), 2, said)
    assert not list(tmp_path.iterdir())


def test_two_prompt_files_of_one_name(run: Run, prompts: Path, tmp_path: Path) -> None:
    result = run("bench", "--out", tmp_path / "out", "--prompts", prompts, "--prompts", f"asked={prompts}")
    assert_one_line_error(result, 2, "prompts 'asked' are given twice")


def test_a_path_may_contain_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").write_text("one\ntwo\n")
    for word, name in ((f"{tmp_path}/a=b.txt", "a=b"), (f"c={tmp_path}/a=b.txt", "c")):
        assert _prompts(ExperimentArguments(prompts=[word])) == {name: ["one", "two"]}


def test_a_folder_of_something_else(run: Run, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("nonsense")
    words = ("bench", "-m", tiny, "-md", "ngram", "--out", tmp_path, "--prompts", prompts, "--each", 1)
    assert_one_line_error(run(*words), 1, "manifest.json")
    (tmp_path / "manifest.json").write_text('{"experiment": 1}')
    assert_one_line_error(run(*words), 2, "was begun with")


def test_the_command_in_the_manifest() -> None:
    weights = BenchModelArguments(target="a b", tuned="c", compile=True)
    options = ExperimentArguments(trees=["2x1", "parents:-1"], each=3, paper=True)
    assert _command(weights, options) == (
        "mcsd bench --target 'a b' --compile --paper --trees 2x1 --trees parents:-1 --each 3 --tuned-draft c"
    )
