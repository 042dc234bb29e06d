"""What has been measured of a target, a draft and a machine: kept in ``$MCSD_HOME/profiles``, one JSON file each."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from mcsd.catalog import locate, models_folder
from mcsd.errors import McsdError, McsdWarning, OutputFailed
from mcsd.files import save_text
from mcsd.machine import processor
from mcsd.models import TransformersModel
from mcsd.planning.acceptance import DEPTH, RANKS, Rates
from mcsd.planning.costs import Costs, Curve
from mcsd.planning.search import LARGEST
from mcsd.schemes import Scheme
from mcsd.tree import TreeShape

_VERSION = 7
"""Another number where what was measured before counts no longer: here, with slower kernels."""


@dataclass(frozen=True)
class Profile:
    """What auto knows before the first step.

    Attributes:
        costs: of steps.
        greedy, sampled: rates of acceptance at temperature 0 and above.
        tree: what has been confirmed to be fastest for one sampled request; None: what the rates say.
        findings: what `mcsd tune` found, for people; empty if nobody has tuned.
    """

    costs: Costs
    greedy: Rates
    sampled: Rates
    tree: TreeShape | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)

    def as_object(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "costs": asdict(self.costs),
            "greedy": self.greedy,
            "sampled": self.sampled,
            "tree": None if self.tree is None else list(self.tree.parents),
            "findings": dict(self.findings),
        }

    @classmethod
    def of_object(cls, value: Mapping[str, Any]) -> "Profile":
        """What `as_object` has made.

        Raises:
            ValueError, TypeError, KeyError, McsdError: it is something else.
        """
        costs = value["costs"]
        tree = value["tree"]
        return cls(
            Costs(
                _curve(costs["target"]),
                _curve(costs["level"]) if costs["level"] else (),
                *(_number(costs[name], 3600) for name in ("first", "plain", "judged", "accepted")),
            ),
            _rates(value["greedy"]),
            _rates(value["sampled"]),
            None if tree is None else _tree(tree),
            dict(value["findings"]),
        )


@dataclass(frozen=True)
class Place:
    """Where the profile of a pair is kept.

    Attributes:
        path: the file, which may or may not be there.
        key: what it is a profile of.
    """

    path: Path
    key: Mapping[str, Any]

    def read(self, scheme: type[Scheme]) -> Profile | None:
        """The profile; None if there is none, or none that can be read and whose tree the scheme can judge."""
        try:
            value = json.loads(self.path.read_text())
            if value["key"] != self.key:
                return None
            profile = Profile.of_object(value)
            if profile.tree is not None:
                scheme.check(profile.tree)
        except (
            OSError,
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            McsdError,
        ):
            return None
        return profile

    def write(self, profile: Profile) -> None:
        """Keep a profile.

        Raises:
            OutputFailed: the disk is full, or the folder cannot be written.
        """
        save_text(self.path, json.dumps({"key": dict(self.key), **profile.as_object()}) + "\n")

    def keep(self, profile: Profile) -> None:
        """As `write`; where that cannot be, it is a warning and no more."""
        try:
            self.write(profile)
        except OutputFailed as error:
            warnings.warn(
                f"every start measures anew, and a seed may have another text then: {error.message:.200}",
                McsdWarning,
                stacklevel=2,
            )


def place_of(target: str | Path, draft: str | Path, model: TransformersModel, **settings: str | bool | None) -> Place:
    """Where a pair's profile is kept.

    Args:
        target, draft: names, folders, files or hub ids, as the user gave them. Files that are replaced are others; what
            a hub replaces under the same id is not noticed.
        model: the target, where it runs and in its dtype.
        settings: what else costs or acceptance depend on.
    """
    key = {
        "version": _VERSION,
        "target": _identity(target),
        "draft": draft if draft == "ngram" else _identity(draft),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor()[0],
        "threads": torch.get_num_threads(),
        "dtype": str(model.network.dtype).removeprefix("torch."),
        **settings,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    names = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", Path(name).name) for name in (target, draft))
    return Place(models_folder().parent / "profiles" / f"{names:.120}-{digest}.json", key)


def _identity(model: str | Path) -> list[Any]:
    """Of weights: where they are, and what their files look like."""
    location = locate(model)
    source = Path(location.source)
    if location.kind == "hub":
        return [location.source]
    files = [source / location.file] if location.file else sorted(source.glob("*.safetensors"))
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(source.resolve()), *(list(state) for state in states)]


def _tree(parents: Any) -> TreeShape:
    if len(parents) > LARGEST:
        raise ValueError("a larger tree than there is room for")
    return TreeShape(parents)


def _curve(points: Any) -> Curve:
    curve = tuple((int(tokens), _number(seconds, 3600)) for tokens, seconds in points)
    rises = all(low[0] < high[0] and low[1] <= high[1] for low, high in pairwise(curve))
    if not curve or curve[0][0] < 1 or curve[0][1] <= 0 or not rises:
        raise ValueError("not a curve")
    return curve


def _rates(levels: Any) -> Rates:
    rates = tuple(tuple(_number(rate, 1) for rate in level) for level in levels)
    if len(rates) != DEPTH or any(len(level) != RANKS for level in rates):
        raise ValueError("not rates")
    return rates


def _number(value: Any, most: float) -> float:
    number = float(value)
    if not (isfinite(number) and 0 <= number <= most):
        raise ValueError(f"{number} is outside 0 to {most}")
    return number
