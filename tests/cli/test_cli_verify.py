"""`mcsd verify` on the command line: exit codes, JSON, the table, wrong options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcsd.config import EngineOptions
from mcsd.cpu.weight_plan import has_bf16_gemm, has_int8_gemm
from mcsd.engine import Engine
from mcsd.testing import TabularModel
from support.cli import Run, assert_one_line_error


class Words:
    """A tokenizer of twelve letters."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 12 for letter in text[:3]]}

    def __len__(self) -> int:
        return 12

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + token) for token in ids)


@pytest.fixture
def tabular(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
    """Replaces loading: an engine of two tables, the same one each time."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(2, 12, 12, generator=generator) ** 2 + 0.01
    target, draft = map(TabularModel, rows / rows.sum(-1, keepdim=True))
    engine = Engine(target, draft, Words(), tree="2x2", max_batch=256, max_length=64)
    monkeypatch.setattr("mcsd.cli.verify.load_engine", lambda options: engine)
    return lambda: engine


def test_a_correct_engine_passes(run: Run, tabular: Callable[[], Engine]) -> None:
    result = run("verify", "--samples", 500, "--contexts", 2, "-n", 8)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "target tabular (float32), draft tabular, tree 2x2, scheme mcss-wor"
    assert lines[2].startswith("greedy: passed. 8 of 8 texts, 64 tokens: 0 ties")
    assert any(line.startswith("sampled: passed. 2 of 2 contexts, 500 of 500 pairs") for line in lines)
    assert lines[-1].startswith("passed in ")


def test_json_is_one_object(run: Run, tabular: Callable[[], Engine], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nbcd\n\ncde\n")
    result = run("verify", "--samples", 500, "--contexts", 2, "-n", 8, "--prompts", prompts, "--json")
    assert (result.code, result.err) == (0, "")
    (line,) = result.out.splitlines()
    value = json.loads(line)
    assert list(value) == [
        *("target", "draft", "tree", "scheme", "dtype", "greedy", "sampled", "seconds", "passed"),
    ]
    assert value["passed"] is value["greedy"]["passed"] is value["sampled"]["passed"] is True
    assert (value["greedy"]["texts"], value["greedy"]["tokens"]) == (3, 24)
    assert [one["samples"] for one in value["sampled"]["contexts"]] == [500, 500]
    assert value["sampled"]["rejected"] == [False] * 3


def test_a_wrong_engine_fails(run: Run, tabular: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    target = tabular().target
    right = target.forward

    def wrong(tokens: Any, block: Any, *rest: Any, **named: Any) -> Any:
        # Only in a tree; the plain forward of the reference is not changed.
        rows = tokens if block.mask.tril().equal(torch.ones_like(block.mask).tril()) else (tokens + 1) % 12
        return right(rows, block, *rest, **named)

    monkeypatch.setattr(target, "forward", wrong)
    words = ["verify", "--samples", 500, "--contexts", 2, "-n", 8]
    result = run(*words)
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines()[-1].startswith("FAILED in ")
    assert "DIFFERENT" in result.out
    result = run(*words, "--json")
    assert result.code == 1
    value = json.loads(result.out)
    assert value["passed"] is value["greedy"]["passed"] is value["sampled"]["passed"] is False
    assert all(not one["tie"] for one in value["greedy"]["divergences"])


CPU = torch.device("cpu")


@pytest.mark.skipif(not has_bf16_gemm(CPU, torch.bfloat16), reason="this CPU has no kernels for packed weights")
@pytest.mark.parametrize(
    "quantize",
    [
        (),
        pytest.param(
            ("--quantize", "int8"), marks=pytest.mark.skipif(not has_int8_gemm(CPU), reason="this CPU has no int8 gemm")
        ),
    ],
)
def test_a_packed_model_passes(quantize: tuple[str, ...], run: Run, tiny: Path) -> None:
    """Its packed layers also run as transformers calls them: without a tree, padded, and without a cache."""
    models = ("-m", tiny, "-md", tiny, "--tree", "2x1", "--dtype", "bfloat16", *quantize)
    result = run("verify", *models, "--samples", 500, "--contexts", 1, "-n", 4, "--temperature", 0.5, "--json")
    assert (result.code, result.err) == (0, "")
    value = json.loads(result.out)
    assert (value["dtype"], value["passed"], value["greedy"]["texts"]) == ("bfloat16", True, 8)
    assert [one["samples"] for one in value["sampled"]["contexts"]] == [500]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--temperature 0", "temperature=0"),
        ("--samples 10", "samples=10"),
        ("--contexts 0", "contexts=0"),
        ("--minutes -1", "minutes=-1.0"),
        ("--prompts no/such", "no/such"),
        ("--top-p 2", "top_p=2.0"),
    ],
)
def test_wrong_options(words: str, said: str, run: Run, tabular: Callable[[], Engine]) -> None:
    assert_one_line_error(run("verify", *words.split()), 2, said)


def test_an_unknown_target(run: Run) -> None:
    assert_one_line_error(run("verify", "--target", "smollm-135"), 2, "no model 'smollm-135'")


@pytest.mark.parametrize(
    ("words", "tree"), [((), "2x2x1"), (("--scheme", "block"), "chain:3"), (("--tree", "none"), "none")]
)
def test_the_default_tree_has_candidates(
    run: Run, tabular: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], tree: str
) -> None:
    """auto may choose plain decoding, which checks nothing."""
    asked = []

    def load(options: EngineOptions) -> Engine:
        asked.append(options.tree)
        return tabular()

    monkeypatch.setattr("mcsd.cli.verify.load_engine", load)
    assert run("verify", "--samples", 500, "--contexts", 1, "-n", 4, *words).code == 0
    assert asked == [tree]
