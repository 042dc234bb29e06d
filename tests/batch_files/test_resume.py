"""Offline batches that are broken off anywhere: each request is answered once, and as in a run in one go."""

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from mcsd.batch_files import BatchOptions, run_batch
from mcsd.batch_files.lines import read_lines
from mcsd.batch_files.output import OutputFile, open_output
from mcsd.config import EngineOptions
from mcsd.engine import Engine
from mcsd.errors import DataError, InvalidOption, OutputFailed
from support.batches import CHAT, TEXT, read_answers, request, same_parts, write_lines
from support.server import table_engine

TALK = [{"role": "user", "content": "abc"}]
LINES = [
    request("no seed", TEXT, {"prompt": "ab", "max_tokens": 20}),
    request("seed", CHAT, {"messages": TALK, "max_tokens": 20, "seed": 7}),
    request("an error", CHAT, {"messages": TALK, "max_tokens": 0}),
    request('\N{SNOWMAN} \ud800 "\n', TEXT, {"prompt": "cd", "max_tokens": 3}),
    request("n", TEXT, {"prompt": "cd", "max_tokens": 8, "n": 2}),
    request("greedy", TEXT, {"prompt": "cd", "max_tokens": 20, "temperature": 0}),
]


@pytest.fixture
def options(tmp_path: Path) -> BatchOptions:
    write_lines(tmp_path / "requests.jsonl", LINES)
    return BatchOptions(tmp_path / "requests.jsonl", tmp_path / "answers.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The answers of a run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    write_lines(folder / "requests.jsonl", LINES)
    run_batch(BatchOptions(folder / "requests.jsonl", folder / "answers.jsonl"), table_engine)
    return (folder / "answers.jsonl").read_bytes()


def cuts(data: bytes) -> Iterator[int]:
    """Places in a file: at the ends of lines, beside them, and inside."""
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    for start, end in zip([0, *ends], ends, strict=False):
        yield from (start, start + 1, start + 20, start + 60, (start + end) // 2, end - 2, end - 1)
    yield len(data)


def no_engine() -> Engine:
    raise AssertionError("nothing is left to do")


def test_a_run_goes_on_wherever_it_was_cut(options: BatchOptions, whole: bytes) -> None:
    places = sorted(set(cuts(whole)))
    assert len(places) > 40
    engine = table_engine()
    for place in places:
        options.output.write_bytes(whole[:place])
        kept = whole[: place - len(whole[:place].rpartition(b"\n")[2])]
        progress = run_batch(options, (lambda: engine) if kept != whole else no_engine)
        assert (progress.resumed, progress.answered) == (kept.count(b"\n"), 6)
        data = options.output.read_bytes()
        assert data.startswith(kept)
        assert list(map(same_parts, read_answers(options.output))) == [
            same_parts(json.loads(line)) for line in whole.splitlines()
        ]
        assert [json.loads(line)["id"] for line in data.splitlines()] == [
            json.loads(line)["id"] for line in whole.splitlines()
        ]


def changed(options: BatchOptions, **fields: Any) -> BatchOptions:
    return replace(options, engine=replace(options.engine, **fields))


def test_other_options_are_refused(options: BatchOptions, whole: bytes) -> None:
    options.output.write_bytes(whole[:-5])
    for other in (
        replace(options, seed=1),
        replace(options, served_name="another"),
        changed(options, target="qwen"),
        changed(options, tree="2x1"),
        changed(options, tree="none"),
        changed(options, scheme="mcss"),
        changed(options, dtype="float32"),
    ):
        with pytest.raises(DataError, match="line 1 answers 'no seed' with another body or other options"):
            run_batch(other, no_engine)
    assert options.output.read_bytes() == whole[:-5]
    same = changed(options, max_batch=3, device="cpu", tree="auto")
    assert run_batch(same, table_engine).answered == 6


def test_another_input_is_refused(options: BatchOptions, whole: bytes) -> None:
    options.output.write_bytes(whole)
    for lines, error in (
        ([LINES[1], LINES[0]], "line 1 answers custom_id 'no seed', not 'seed'"),
        ([LINES[0], LINES[1].replace("7", "8")], "line 2 answers 'seed' with another body"),
        (LINES[:5], "line 6 answers no request"),
    ):
        write_lines(options.input, lines)
        with pytest.raises(DataError, match=error):
            run_batch(options, no_engine)
    # Requests may be added.
    write_lines(options.input, [*LINES, request("more", TEXT, {"prompt": "a"})])
    assert run_batch(options, table_engine).answered == 7


@pytest.mark.parametrize("text", ["precious", "precious\n", "{}\n", "[1]\n", '{"id": "batch_req_1"', "\0" * 30])
def test_another_file_is_left_alone(text: str, options: BatchOptions) -> None:
    options.output.write_text(text)
    with pytest.raises(DataError, match="line 1"):
        run_batch(options, no_engine)
    assert options.output.read_text() == text


def test_one_process_writes(options: BatchOptions) -> None:
    with (
        open_output(options.output, iter(())),
        pytest.raises(InvalidOption, match=r"answers\.jsonl is being written by another process"),
    ):
        run_batch(options, no_engine)


class Full(FileIO):
    """A file on a disk that is full after some bytes."""

    left = 100

    def write(self, data: Any) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(data[: self.left])
        self.left -= written
        return written


def test_a_full_disk_leaves_whole_answers(options: BatchOptions) -> None:
    options.output.touch()
    output = OutputFile(options.output, Full(options.output, "r+"), read_lines(options.input, options.key))
    output.append("x" * 60)
    with pytest.raises(OutputFailed, match="No space left"):
        output.append("y" * 60)
    assert options.output.read_text() == "x" * 60 + "\n"
    output._file.close()
    with pytest.raises(OutputFailed):
        run_batch(replace(options, output=options.input.parent), no_engine)


def test_options_are_checked() -> None:
    for wrong in ({"seed": -1}, {"seed": 1 << 64}, {"served_name": ""}, {"served_name": "a\n"}):
        with pytest.raises(InvalidOption):
            BatchOptions(Path("a"), Path("b"), EngineOptions(), **wrong)
