"""Every planted fault still has its place in the source, once, and what it makes of Python is Python."""

from pathlib import Path

import pytest
from faults import FAULTS, Fault

import mcsd


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (Path(mcsd.__file__).parent / fault.file).read_text()
    assert text.count(fault.old) == 1
    if fault.file.endswith(".py"):
        compile(text.replace(fault.old, fault.new), fault.file, "exec")
