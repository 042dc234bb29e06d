"""The profile of a target, a draft and a machine: what calibration measured, one JSON file each in the cache folder."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch

from mcsd.errors import McsdError, McsdWarning, OutputFailed
from mcsd.files import save_text
from mcsd.loading.catalog import locate
from mcsd.models import DecoderModel
from mcsd.planning.acceptance import DEPTH, RANKS, Rates
from mcsd.planning.costs import Curve, StepCosts
from mcsd.planning.search import MAX_NODES
from mcsd.schemes.registry import check_tree
from mcsd.system import cache_folder, processor
from mcsd.tree import TreeShape

_VERSION = 8
"""Pairs with a profile of another version are measured again."""


@dataclass(frozen=True)
class Profile:
    """What tree "auto" knows before the first step.

    Attributes:
        costs: of steps.
        greedy, sampled: acceptance rates at temperature 0 and above.
        tree: confirmed as the fastest for one sampled request; None: the one that the rates predict.
        findings: of `mcsd tune`, for people; empty if it has not run.
    """

    costs: StepCosts
    greedy: Rates
    sampled: Rates
    tree: TreeShape | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The profile as a JSON object."""
        return {
            "costs": asdict(self.costs),
            "greedy": self.greedy,
            "sampled": self.sampled,
            "tree": None if self.tree is None else list(self.tree.parents),
            "findings": dict(self.findings),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Profile":
        """The profile of a JSON object.

        Raises:
            ValueError, TypeError, KeyError, McsdError: it is not a profile.
        """
        costs = value["costs"]
        tree = value["tree"]
        return cls(
            StepCosts(
                _curve(costs["target"]),
                _curve(costs["level"]) if costs["level"] else (),
                *(_number(costs[name], 3600) for name in ("first", "plain", "verified", "accepted")),
            ),
            _rates(value["greedy"]),
            _rates(value["sampled"]),
            None if tree is None else _tree(tree),
            dict(value["findings"]),
        )


class ProfileStore(Protocol):
    """Where the profile of a pair is kept."""

    def read(self, scheme: str) -> Profile | None:
        """The profile; None if there is none for this scheme."""
        ...

    def try_write(self, scheme: str, profile: Profile) -> None:
        """Keep a profile, if that is possible."""
        ...


@dataclass(frozen=True)
class ProfileFile:
    """The file of a pair's profile.

    Attributes:
        path: of the file, which may not exist.
        key: what the profile depends on.
    """

    path: Path
    key: Mapping[str, Any]

    def read(self, scheme: str) -> Profile | None:
        """The profile; None if there is none, it cannot be read, or the scheme does not support its tree."""
        try:
            value = json.loads(self.path.read_text())
            if value["key"] != self.key:
                return None
            profile = Profile.from_json(value)
            if profile.tree is not None:
                check_tree(scheme, profile.tree)
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
        """Write a profile.

        Raises:
            OutputFailed: the disk is full, or the folder is not writable.
        """
        save_text(self.path, json.dumps({"key": dict(self.key), **profile.to_json()}) + "\n")

    def try_write(self, scheme: str, profile: Profile) -> None:
        """`write`; a warning if it fails. The scheme is in the key."""
        try:
            self.write(profile)
        except OutputFailed as error:
            warnings.warn(
                f"every start calibrates again, and a seed may then give another text: {error.message:.200}",
                McsdWarning,
                stacklevel=2,
            )


def profile_file(target: DecoderModel, draft: Any, scheme: str) -> ProfileFile:
    """The file of a loaded pair's profile.

    Args:
        target: on its device.
        draft: a `DecoderModel`, a `mcsd.models.BoundHead`, or "ngram". A weight file that is replaced makes another
            pair; a new revision of a hub id is not noticed.
        scheme: that verifies.
    """
    draft_name = "ngram" if draft == "ngram" else draft.name
    key = {
        "version": _VERSION,
        "target": _identity(target.name),
        "draft": draft_name if draft == "ngram" else _identity(draft_name),
        "device": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else processor()[0],
        "threads": torch.get_num_threads(),
        "precision": [target.precision, "" if draft == "ngram" else draft.precision],
        "scheme": scheme,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    names = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", Path(name).name) for name in (target.name, draft_name))
    return ProfileFile(cache_folder("profiles") / f"{names:.120}-{digest}.json", key)


def _identity(model: str) -> list[Any]:
    """The location of weights, and the size and time of their files."""
    location = locate(model)
    source = Path(location.source)
    if location.kind == "hub":
        return [location.source]
    files = [source / location.file] if location.file else sorted(source.glob("*.safetensors"))
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(source.resolve()), *(list(state) for state in states)]


def _tree(parents: Any) -> TreeShape:
    if len(parents) > MAX_NODES:
        raise ValueError(f"a tree of more than {MAX_NODES} nodes")
    return TreeShape(parents)


def _curve(points: Any) -> Curve:
    curve = tuple((int(tokens), _number(seconds, 3600)) for tokens, seconds in points)
    rises = all(low[0] < high[0] and low[1] <= high[1] for low, high in pairwise(curve))
    if not curve or curve[0][0] < 1 or curve[0][1] <= 0 or not rises:
        raise ValueError("not a rising curve")
    return curve


def _rates(levels: Any) -> Rates:
    rates = tuple(tuple(_number(rate, 1) for rate in level) for level in levels)
    if len(rates) != DEPTH or any(len(level) != RANKS for level in rates):
        raise ValueError("not acceptance rates")
    return rates


def _number(value: Any, maximum: float) -> float:
    number = float(value)
    if not (isfinite(number) and 0 <= number <= maximum):
        raise ValueError(f"{number} is outside 0 to {maximum}")
    return number
