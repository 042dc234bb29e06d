"""The text that each fault replaces occurs once in the source, and faults in Python files still compile."""

from pathlib import Path

import pytest

import mcsd
from mutants.faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (Path(mcsd.__file__).parent / fault.file).read_text()
    assert text.count(fault.old) == 1
    if fault.file.endswith(".py"):
        compile(text.replace(fault.old, fault.new), fault.file, "exec")
