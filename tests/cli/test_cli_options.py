"""The shared options: same names and defaults as in Python, and `-md` is one option."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from mcsd.cli import app
from mcsd.cli.distill import DistillArguments
from mcsd.cli.options import Json, SamplingArguments, command
from mcsd.config import EngineOptions
from mcsd.distill import DistillOptions
from mcsd.engine import Engine
from mcsd.errors import InvalidParameter
from mcsd.params import SamplingParams
from support.cli import Run, assert_one_line_error

SHARED = """
    --target -m --draft -md --tree --scheme --temperature --top-k --top-p --min-p --max-new-tokens -n --seed --stop
    --repetition-penalty --presence-penalty --frequency-penalty --ignore-eos --device --dtype --quantize --compile
    --typical-p --min-new-tokens --stop-token-ids --include-stop --no-skip-special-tokens --bad-words
    --json-schema --json-object --regex --grammar
    --max-length --sampling-defaults --system --json --color --no-color --debug
"""


NO_OPTION = {
    *("n", "prediction", "logit_bias"),  # Not words of a command line.
    "speculative",  # The command line has one request at a time: --tree none.
    *("logprobs", "prompt_logprobs", "logits_processors", "stopping_criteria"),  # Numbers and functions of Python.
}
"""Sampling parameters without an option."""


def parsed(*words: str) -> dict[str, Any]:
    """What a command gets for these words."""
    got: dict[str, Any] = {}

    @command
    def probe(engine: EngineOptions, sampling: SamplingArguments, json: Json = False) -> None:
        got.update(engine=engine, sampling=sampling, json=json)

    probe_app = typer.Typer()
    probe_app.command()(probe)
    with get_command(probe_app).make_context("probe", list(words)) as context:
        context.command.invoke(context)
    return got


def test_defaults_of_distill_are_those_of_python() -> None:
    python = {field.name: field.default for field in fields(DistillOptions)}
    shell = {field.name: field.default for field in fields(DistillArguments)}
    assert {**shell, "target": MISSING} == python


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_commands_have_all_shared_options(name: str) -> None:
    group: Any = get_command(app)
    params = group.commands[name].params
    have = {word for param in params for word in (*param.opts, *param.secondary_opts)}
    assert set(SHARED.split()) <= have


@pytest.mark.parametrize("words", ["generate x", "chat"])
def test_one_conversation_needs_a_cache_for_one_sequence(words: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(options: EngineOptions) -> Engine:
        asked.append(options.max_batch)
        raise InvalidParameter("no engine", "none is needed")

    monkeypatch.setattr(f"mcsd.cli.{words.split()[0]}.load_engine", load)
    assert_one_line_error(run(*words.split()), 2, "no engine")
    assert asked == [1]


def test_defaults_are_those_of_python() -> None:
    load = inspect.signature(Engine.load).parameters
    for field in fields(EngineOptions):
        assert load[field.name].default == field.default, field.name
    assert set(load) == {field.name for field in fields(EngineOptions)}
    in_python = {field.name for field in fields(SamplingParams)}
    assert in_python - {field.name for field in fields(SamplingArguments)} == NO_OPTION
    assert SamplingArguments().given() == {}


@pytest.mark.parametrize(
    ("words", "target", "draft"),
    [
        ("", "smollm2-135m", None),
        ("-md x", "smollm2-135m", "x"),
        ("-m y -md x", "y", "x"),
        ("-md x -m y", "y", "x"),
        ("--draft x --target=y", "y", "x"),
        ("-md=x", "smollm2-135m", "x"),
        ("-m d", "d", None),
    ],
)
def test_md_is_one_option(words: str, target: str, draft: str | None) -> None:
    engine = parsed(*words.split())["engine"]
    assert (engine.target, engine.draft) == (target, draft)


def test_every_value_arrives() -> None:
    words = """
        --tree 2x2 --scheme mcss --device cpu --dtype float32 --quantize int8 --compile --max-length 9
        --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 -n 7 --seed 3 --stop a --stop b
        --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --ignore-eos --json
        --typical-p 0.8 --min-new-tokens 2 --stop-token-ids 5 --stop-token-ids 6 --include-stop
        --no-skip-special-tokens --bad-words c
    """
    got = parsed(*words.split())
    assert got["json"]
    assert got["engine"] == EngineOptions(
        device="cpu", dtype="float32", quantize="int8", compile=True, tree="2x2", scheme="mcss", max_length=9
    )
    assert got["sampling"].given() == {
        **{"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "seed": 3},
        **{"max_new_tokens": 7, "min_new_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [5, 6]},
        **{"include_stop": True, "skip_special_tokens": False, "bad_words": ["c"], "ignore_eos": True},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3},
    }


def test_values_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(InvalidParameter):
        SamplingArguments(top_p=2.0).given()


def test_schemas_and_grammars_come_from_files(tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "answer.lark"
    schema.write_text('{"type": "object"}')
    grammar.write_text('start: "yes" | "no"')
    assert parsed("--json-schema", str(schema))["sampling"].given() == {"json_schema": schema.read_text()}
    assert parsed("--json-schema", '{"type": "null"}')["sampling"].given() == {"json_schema": '{"type": "null"}'}
    assert parsed("--grammar", str(grammar))["sampling"].given() == {"grammar": grammar.read_text()}
    assert parsed("--json-object")["sampling"].given() == {"json_object": True}
    grammar.write_bytes(b"\xff")
    for words in (
        ("--grammar", str(grammar)),
        ("--json-schema", str(tmp_path / "absent")),
        ("--grammar", str(tmp_path)),
    ):
        with pytest.raises(InvalidParameter, match="cannot be read"):
            parsed(*words)["sampling"].given()
