"""Files: records of a log come back except for a line that was being written; settings; locks."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from mcsd.errors import DataError, InvalidOption, OutputFailed
from mcsd.files import JsonlLog, check_settings, exclusive_lock


@dataclass(frozen=True)
class Entry:
    name: str
    number: int


def entry(number: int) -> Entry:
    return Entry("some words", number)


def log_at(path: Path, key: dict[str, Any] | None = None) -> JsonlLog[Entry]:
    return JsonlLog(path, lambda value: Entry(**value), key)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    log = log_at(tmp_path / "log")
    for number in range(3):
        log.append(entry(number))
        assert len((tmp_path / "log").read_text().splitlines()) == number + 1
    assert log_at(tmp_path / "log").records == log.records == [entry(0), entry(1), entry(2)]


@pytest.mark.parametrize("key", [None, {"of": "this"}])
@pytest.mark.parametrize("cut", [1, 20, 35])
def test_a_line_that_was_being_written_is_dropped(cut: int, key: dict[str, Any] | None, tmp_path: Path) -> None:
    lines = [json.dumps(asdict(entry(number))) for number in range(2)]
    if key is not None:
        lines.insert(0, json.dumps({"log": key}))
    (tmp_path / "log").write_text("\n".join([*lines[:-1], lines[-1][:cut]]))
    log = log_at(tmp_path / "log", key)
    assert log.records == [entry(0)]
    log.append(entry(1))
    assert (tmp_path / "log").read_text().splitlines() == lines


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"name": "some"}', '{"other": 1}'])
def test_another_broken_line_is_an_error_without_a_key(line: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        log_at(tmp_path / "log")


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"name": "some"}', '{"other": 1}'])
def test_with_a_key_records_from_a_broken_line_on_are_dropped(line: str, tmp_path: Path) -> None:
    log = log_at(tmp_path / "log", {"of": "this"})
    log.append(entry(0))
    before = (tmp_path / "log").read_text()
    (tmp_path / "log").write_text(before + line + "\n" + json.dumps(asdict(entry(1))) + "\n")
    assert log_at(tmp_path / "log", {"of": "this"}).records == [entry(0)]
    assert (tmp_path / "log").read_text() == before


def test_a_log_of_another_key_starts_anew(tmp_path: Path) -> None:
    log_at(tmp_path / "log", {"of": "this"}).append(entry(0))
    assert log_at(tmp_path / "log", {"of": "this"}).records == [entry(0)]
    assert log_at(tmp_path / "log", {"of": "that"}).records == []
    assert (tmp_path / "log").read_text() == '{"log": {"of": "that"}}\n'
    (tmp_path / "log").write_bytes(b"\xff\n")
    assert log_at(tmp_path / "log", {"of": "that"}).records == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    log = log_at(tmp_path / "no" / "log")
    with pytest.raises(OutputFailed):
        log.append(entry(0))
    (tmp_path / "file").touch()
    with pytest.raises(OutputFailed), exclusive_lock(tmp_path / "file" / "lock"):
        pass


def test_settings_must_be_the_same(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    check_settings(path, {"version": 2, "a": {"b": 1}})
    check_settings(path, {"version": 2, "a": {"b": 1}})
    with pytest.raises(InvalidOption, match=r"was begun with a\.b=1, not 2"):
        check_settings(path, {"version": 2, "a": {"b": 2}})
    with pytest.raises(InvalidOption, match="another version of mcsd"):
        check_settings(path, {"version": 3, "a": {"b": 1}})


def test_a_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    for _ in range(2):
        refused = pytest.raises(InvalidOption, match="another process")
        with exclusive_lock(tmp_path / "lock"), refused, exclusive_lock(tmp_path / "lock"):
            pass
