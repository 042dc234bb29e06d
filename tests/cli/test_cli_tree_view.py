"""`mcsd generate --show-tree`: its lines, colors and widths, and end to end on real weights."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.cells import cell_len

from mcsd.cli.tree_view import show_steps
from mcsd.loading.catalog import Location
from mcsd.results import Chunk
from mcsd.step_trace import StepTrace
from mcsd.tree_picture import LEGEND
from support.cli import Run, assert_one_line_error, start

TRACE = StepTrace(
    parents=(-1, -1, 0, 0, 1, 2),
    token_ids=(10, 11, 12, 13, 14, 15),
    pieces=(" Paris", " the", ".", "\x1b[2J", " city", " It"),
    q=(0.4, 0.3, 0.6, 0.2, None, 0.1),
    p=(0.8, 0.1, 0.5, 0.0, 0.2, 0.25),
    top=((), (), (), ((16, 0.75),), (), (), ()),
    top_q=((), (), (), (0.5,), (), (), ()),
    path=(0, 2),
    token_id=16,
    scheme="mcss-wor",
    piece="\n",
)
CHUNK = Chunk(" Paris.\n", (10, 12, 16), 2, (" Paris", ".", "\n"), trace=TRACE)
PICTURE = r"""
step 1 · 2 of 6 candidates accepted · acceptance length 3
├── ✓ " Paris"   p 0.800  q 0.400
│   ├── ✓ "."        p 0.500  q 0.600
│   │   ├── × " It"      p 0.250  q 0.100
│   │   └── ★ "\n"       p 0.750
│   └── × "\x1b[2J"  p 0.000  q 0.200
└── × " the"     p 0.100  q 0.300
    × " city"    p 0.200
text:  Paris.\n
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(
    monkeypatch: pytest.MonkeyPatch,
    *chunks: Chunk,
    color: bool | None = None,
    columns: int = 80,
    output: type[io.StringIO] = io.StringIO,
) -> str:
    stdout = output()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", stdout)
    assert list(show_steps(chunks, color)) == list(chunks)
    return stdout.getvalue()


def test_the_picture_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, CHUNK) == f"{LEGEND}\n{PICTURE}\n"


def test_a_step_that_emits_less_than_it_accepted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    last = replace(CHUNK, text=" Paris", token_ids=(10,), accepted=1, pieces=(" Paris",))
    assert "acceptance length 3 · text ends after 1\n" in shown(monkeypatch, last)


def test_color_marks_the_path_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored = shown(monkeypatch, CHUNK, color=True)
    assert '\x1b[32m✓ " Paris"' in colored
    assert '\x1b[2m× " the"' in colored
    assert '\x1b[1m★ "\\n"' in colored
    assert re.sub(r"\x1b\[\d*m", "", colored) == shown(monkeypatch, CHUNK, color=False)


def test_no_color_has_no_control_codes_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in shown(monkeypatch, CHUNK, output=Terminal)
    assert "\x1b" not in shown(monkeypatch, CHUNK, color=False, output=Terminal)
    assert "\x1b" not in shown(monkeypatch, CHUNK)


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    long = replace(TRACE, pieces=(" Paris" * 9, "日本語" * 9, *TRACE.pieces[2:]))
    lines = shown(monkeypatch, replace(CHUNK, trace=long), columns=columns).splitlines()
    assert max(map(cell_len, lines)) <= columns
    assert any("…" in line for line in lines)


def test_a_deep_chain_stays_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 900
    numbers, tokens = (0.5,) * count, tuple(range(count))
    parents, pieces = tuple(range(-1, count - 1)), tuple(f"t{token}" for token in tokens)
    top = ((),) * (count + 1)
    deep = StepTrace(parents, tokens, pieces, numbers, numbers, top, top, tokens[:800], 7, "mcss-wor", "end")
    lines = shown(monkeypatch, replace(CHUNK, trace=deep)).splitlines()
    # The 800th candidate has two children: the 801st and the target's token.
    assert [line for line in lines if '"t799"' in line or '"t801"' in line or '"end"' in line] == [
        '    ✓ "t799"  p 0.500  q 0.500',
        '    │   × "t801"  p 0.500  q 0.500',
        '    └── ★ "end"',
    ]


def test_the_end_of_the_text_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [replace(CHUNK, text=f" word {i}", pieces=(f" word {i}",), trace=TRACE) for i in range(20)]
    text = shown(monkeypatch, *chunks, columns=100)
    assert "text:  word 0 word 1\n" in text
    assert "text: … word 13 word 14 word 15 word 16 word 17 word 18 word 19\n" in text


def test_real_weights(smollm2_location: Location) -> None:
    words = ["generate", "Tell me the capital of France.", "-n", 24, "--seed", 3, "--temperature", 1, "--tree", "2x2"]
    # Together: loading the weights takes most of the time.
    runs = [start(*words, *more, stdin=subprocess.DEVNULL) for more in ((), ("--show-tree",))]
    (plain, _), (out, err) = (run.communicate(timeout=300) for run in runs)
    assert [run.returncode for run in runs] == [0, 0], err
    assert "tokens per step" in err
    assert "\x1b" not in out
    assert out.startswith(f"{LEGEND}\n\nstep 1 · ")
    assert out.endswith(f"\n\n{plain}")
    assert len(plain.strip()) > 12
    steps = re.findall(r"^step \d+ · \d of 6 candidates accepted · acceptance length (\d)", out, re.MULTILINE)
    assert sum(map(int, steps)) >= 24
    assert out.count("★") == len(steps) + 1
    lines = re.findall(r"^[│├└─ ]+[✓×] .* p \d\.\d{3}  q \d\.\d{3}$", out, re.MULTILINE)
    assert len(lines) == 6 * len(steps)


def test_json_has_the_steps_as_data(run: Run, tiny: object) -> None:
    words = [
        "generate",
        "Once",
        "-m",
        tiny,
        "-md",
        tiny,
        "--tree",
        "2x1",
        "--dtype",
        "float32",
        "-n",
        6,
        "--ignore-eos",
    ]
    words += ["--seed", 1, "--json"]
    plain, traced = (json.loads(run(*words, *more).out) for more in ((), ("--show-tree",)))
    steps = traced.pop("steps")
    assert len(steps) == traced["speculative_decoding"]["target_calls"]
    assert set(steps[0]) == set(StepTrace.__dataclass_fields__)
    tokens = [token for step in steps for token in (*(step["token_ids"][i] for i in step["path"]), step["token_id"])]
    assert tokens[:6] == traced["token_ids"] == plain["token_ids"]
    assert traced.keys() == plain.keys()


def test_a_profile_is_refused(run: Run) -> None:
    assert_one_line_error(run("generate", "x", "--show-tree", "--profile"), 2, "--show-tree", "--profile")
