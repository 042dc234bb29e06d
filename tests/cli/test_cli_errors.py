"""Wrong options: exit code 2; work that failed: exit code 1. One line and a hint, and nothing on stdout."""

from pathlib import Path

import pytest

from mcsd.loading.catalog import Location
from support.broken_heads import COMMON, FORMATS
from support.cli import Run, assert_one_line_error
from support.eagle import Published, target_network


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate x --target smollm-135", "no model 'smollm-135'"),
        ("generate x --draft=", "no model ''"),
        ("generate x --target no/such.gguf", "no file 'no/such.gguf'"),
        ("generate x --tree 2y", "2y"),
        ("generate x --tree 99x99", "99x99"),
        ("generate x --tree 2x1 --scheme block", "scheme block supports chains"),
        ("generate x --dtype int7", "int7"),
        ("generate x --device abacus", "abacus"),
        ("generate x --quantize nope", "nope"),
        ("generate x --temperature -1", "temperature=-1.0"),
        ("generate x --temperature nan", "temperature=nan"),
        ("generate x --temperature inf", "temperature=inf"),
        ("generate x --top-p 0", "top_p=0.0"),
        ("generate x --top-p 2", "top_p=2.0"),
        ("generate x --top-k -1", "top_k=-1"),
        ("generate x -n 0", "max_new_tokens=0"),
        ("generate x --max-length abc", "--max-length"),
        ("generate x --no-such-option", "--no-such-option"),
        ("generate x --raw --system y", "--system"),
        ("generate x --sampling-defaults y", "sampling_defaults 'y'"),
        ("cache sweep", "sweep"),
        ("generate x y", "y"),
        ("generate", "prompt is empty"),
        ("generate -", "prompt is empty"),
        ("chat --min-p 2", "min_p=2.0"),
        ("distill", "--out"),
        ("distill --out x --kind tail", "kind 'tail'"),
        ("distill --out x --steps 0", "steps=0"),
        ("distill --out x --data no/such", "no/such"),
        ("distill --out x --target no/such.gguf", "no file 'no/such.gguf'"),
        ("pull nothing", "no model 'nothing'"),
        ("pull", "name"),
        ("nonsense", "nonsense"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_wrong_options(words: str, said: str, run: Run) -> None:
    assert_one_line_error(run(*words.split()), 2, said)


def test_empty_prompt(run: Run) -> None:
    assert_one_line_error(run("generate", ""), 2, "prompt is empty")


def test_prompt_that_is_not_text(run: Run) -> None:
    assert_one_line_error(run("generate", "caf\udce9"), 2, "not UTF-8")


def test_unknown_scheme(run: Run, tiny: Path) -> None:
    assert_one_line_error(run("generate", "x", "-m", tiny, "--scheme", "nope", "--json"), 2, "nope")


def test_prompt_too_long(run: Run, tiny: Path) -> None:
    words = ["generate", "a " * 40, "--raw", "-m", tiny, "--dtype", "float32", "--max-length", 20, "--json"]
    assert_one_line_error(run(*words), 2, "41 tokens", "20")


def test_truncated_weights(run: Run, smollm2_location: Location, tmp_path: Path) -> None:
    source, file = smollm2_location.source, smollm2_location.file
    assert file
    broken = tmp_path / "broken.gguf"
    with (Path(source) / file).open("rb") as whole:
        broken.write_bytes(whole.read(20_000_000))
    assert_one_line_error(run("generate", "x", "-m", broken), 1, "broken.gguf")
    broken.write_bytes(b"GGUF")
    assert_one_line_error(run("generate", "x", "-m", broken), 1, "broken.gguf")


@pytest.mark.parametrize("published", FORMATS, ids=str)
@pytest.mark.parametrize("fault", COMMON)
def test_broken_draft_head(fault: str, published: Published, run: Run, tmp_path: Path) -> None:
    target, head = tmp_path / "target", tmp_path / "head"
    target_network().save_pretrained(target)
    published.write(head)
    COMMON[fault][0](head)
    code = 2 if fault == "head of another target" else 1
    assert_one_line_error(run("generate", "x", "-m", target, "--draft", head), code, str(head), COMMON[fault][1])


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run("generate", "x", "--top-p", "2", "--debug")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Traceback")
    assert "error: top_p=2.0" in result.err
    # The next command line is without --debug again.
    assert_one_line_error(run("generate", "x", "--top-p", "2"), 2)
