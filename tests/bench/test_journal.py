"""What is on disk is there again, but for a line that was being written."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mcsd.bench.journal import Accepted, Journal
from mcsd.errors import DataError, OutputFailed


def entry(number: int) -> Accepted:
    return Accepted("draft", "mcss", "set", number, 1.0, 10, [1, 2])


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log", Accepted)
    for number in range(3):
        journal.append(entry(number))
        assert len((tmp_path / "log").read_text().splitlines()) == number + 1
    again = Journal(tmp_path / "log", Accepted)
    assert again.entries == journal.entries == [entry(0), entry(1), entry(2)]
    assert entry(2).key in again
    assert entry(3).key not in again


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_that_was_being_written_is_dropped(cut: int, tmp_path: Path) -> None:
    lines = [json.dumps(asdict(entry(number))) for number in range(2)]
    (tmp_path / "log").write_text(lines[0] + "\n" + lines[1][:cut])
    journal = Journal(tmp_path / "log", Accepted)
    assert journal.entries == [entry(0)]
    journal.append(entry(1))
    assert (tmp_path / "log").read_text().splitlines() == lines


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"draft": "draft"}', '{"other": 1}'])
def test_another_broken_line_is_an_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        Journal(tmp_path / "log", Accepted)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "no" / "log", Accepted)
    with pytest.raises(OutputFailed):
        journal.append(entry(0))
