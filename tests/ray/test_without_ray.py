"""Without the extra, what needs it says so."""

import sys

import pytest

import mcsd
from mcsd.cli import main
from mcsd.errors import MissingPackage


@pytest.fixture
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("ray.", "mcsd.ray."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")


@pytest.mark.usefixtures("_without_ray")
def test_python_names_the_extra() -> None:
    with pytest.raises(MissingPackage, match=r'mcsd\.ray needs ray \(pip install "mcsd\[ray\]"\)'):
        mcsd.ray.deployment()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_without_ray")
def test_the_command_line_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ray", "1"]) == 1
    assert 'pip install "mcsd[ray]"' in capsys.readouterr().err


def test_numbers_of_replicas_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    for words, error in ((["--ray", "-1"], "num_replicas=-1"), (["--ray", "1", "--ray-gpus", "2"], "num_gpus=2")):
        assert main(["serve", *words]) == 2
        assert error in capsys.readouterr().err
