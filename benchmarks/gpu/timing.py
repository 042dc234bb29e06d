"""Tokens per second of ``generate``, assisted generation and mcsd on the synthetic pair, and what a step consists of.

Every system first runs the texts that are then timed, with the same seeds: so whatever depends on lengths, such as
plans of attention kernels and captured graphs, is there before the clock starts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from operator import add
from typing import Any

import torch

import mcsd
from gpu.engines import make_engine
from gpu.runners import Measurement, Runner, Workload, cache_bytes, engine_runner, generate_runner, weight_bytes
from gpu.session import Session
from gpu.step_profile import count_step, device_memory_gb
from gpu.synthetic_pair import measure_agreement

GENERATE, ASSISTED, STATIC = "generate", "generate, assisted", "generate, static cache"
TREES = ("none", "chain:4", "chain:8", "2x2x1", "4x2x1", "4x2x2x1", "4x2x2x2")
"""Up to 60 candidates."""
FEW_TREES = ("none", "chain:4", "4x2x1", "4x2x2x2")
"""Those of short runs and of the large batch; their steps are profiled."""

EAGER_TREES = ("none", "4x2x1")
"""Those of models as they are given, if ``optimize=True`` has an effect."""

TEMPERATURES = (1.0, 0.0)
LARGE_BATCH = 8
_RESERVE = 15
"""Seconds that must be left to time another system."""


def measure_pair(session: Session) -> None:
    """How much target and draft agree."""
    agreement = measure_agreement(session.pair)
    pair = session.pair
    session.results["pair"] = {"target": pair.target_name, "draft": pair.draft_name, "eps": session.options.eps}
    session.results["pair"] |= agreement
    session.say(", ".join(f"{name} {value:.3f}" for name, value in agreement.items()))


def time_alone(session: Session) -> None:
    """All systems on one text; in a short run fewer trees."""
    _time_systems(session, 1, FEW_TREES if session.is_short else TREES)


def time_batch(session: Session) -> None:
    """Some systems on `LARGE_BATCH` texts together."""
    _time_systems(session, LARGE_BATCH, FEW_TREES)


def _time_systems(session: Session, batch: int, trees: Sequence[str]) -> None:
    """All systems, one after the other; what there is no time for is named."""
    forms = session.forms
    for temperature in TEMPERATURES:
        work = _workload(session, temperature, batch)
        for system, form, tree in _systems(batch, trees, list(forms)):
            if session.seconds_left < _RESERVE:
                session.results["skipped"][f"timing: {system}, {work}"] = "no time left"
                session.say(f"no time left for {system}, {work}")
                continue
            try:
                if tree is None:
                    run = generate_runner(session, session.pair, work, system == ASSISTED)
                    record = _time(session, system, work, run)
                else:
                    engine = make_engine(*forms[form], tree, batch, work.max_length)
                    record = _time(session, system, work, engine_runner(session, engine, work), engine)
            except Exception as error:
                session.results["failed"][f"timing: {system}, {work}"] = _named(error)
                session.say(f"FAILED: {system}, {work}: {_named(error)}")
            else:
                session.results.setdefault("timing", []).append(record)
    session.results.setdefault("pair", {})["largest memory, GB"] = device_memory_gb(session)


def time_static(session: Session) -> None:
    """``generate`` with a static cache, which transformers compiles on a card. A failure is no fault of mcsd."""
    for temperature in TEMPERATURES:
        work = _workload(session, temperature, 1)
        run = generate_runner(session, session.pair, work, cache_implementation="static")
        try:
            record = _time(session, STATIC, work, run)
        except Exception as error:
            session.results["skipped"][f"static: T={temperature:g}"] = _named(error)
            session.say(f"{STATIC} did not run: {_named(error)}")
            return
        session.results.setdefault("timing", []).append(record)


def _workload(session: Session, temperature: float, batch: int) -> Workload:
    return Workload(session.pair.target.config.vocab_size, batch, temperature, session.options.new)


def _systems(batch: int, trees: Sequence[str], forms: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Name of each system, form of its models, and its tree; no tree for those of transformers."""
    yield GENERATE, "", None
    if batch == 1:
        yield ASSISTED, "", None
    for tree in trees:
        for form in forms:
            if form or len(forms) == 1 or tree in EAGER_TREES:
                yield f"mcsd {tree}{form}", form, tree


def _time(
    session: Session, system: str, work: Workload, run: Runner, engine: mcsd.Engine | None = None
) -> dict[str, Any]:
    """Warm up, time, and for some trees profile a system: a line of the results."""
    seeds = (1,) if session.tiny else (1, 2)
    for seed in seeds:
        run(seed)
    measured = reduce(add, [run(seed) for seed in seeds])
    record: dict[str, Any] = {"system": system, "temperature": work.temperature, "batch": work.batch}
    record |= {
        "tokens/s": measured.tokens / measured.seconds,
        "target calls": measured.target_calls,
        "acceptance length": measured.tokens / measured.target_calls,
        "ms per step": 1e3 * measured.step_seconds / measured.steps,
        "share of roofline": _least_seconds(session, measured, engine) / measured.step_seconds,
    }
    if engine is not None:
        caches = [engine.graphs, *([engine.drafter.graphs] if hasattr(engine.drafter, "graphs") else [])]
        record["graphs"] = sum(cache.stats.graphs for cache in caches)
        record["memory of graphs, MB"] = sum(cache.stats.bytes for cache in caches) / 1e6
        record["parts, ms"] = {name: 1e3 * value / measured.steps for name, value in measured.parts.items()}
        if str(engine.tree) in FEW_TREES:
            try:
                counts = count_step(session, engine, work)
                record["counts"] = "not measured" if counts is None else asdict(counts)
            except Exception as error:  # Some machines do not let a process profile the card.
                record["counts"] = f"not measured: {_named(error)}"
    session.say(
        f"{system}, {work}: {record['tokens/s']:.1f} tokens/s,"
        f" {record['acceptance length']:.2f} tokens per target call, {record['ms per step']:.2f} ms per step,"
        f" {record['share of roofline']:.0%} of the roofline"
    )
    return record


def _least_seconds(session: Session, measured: Measurement, engine: mcsd.Engine | None) -> float:
    """Time to read the weights and the cache of all timed steps at the bandwidth of a copy."""
    pair = session.pair
    models: list[torch.nn.Module] = [pair.target, pair.draft]
    if engine is not None:
        weights = (
            getattr(engine.target, "weights", None),
            getattr(getattr(engine.drafter, "model", None), "weights", None),
        )
        models = [own or given for own, given in zip(weights, models, strict=True)]
    target, draft = (weight_bytes(model) for model in models)
    length = measured.cached_tokens / measured.steps
    read = measured.steps * (target + length * cache_bytes(pair.target))
    read += measured.draft_calls * (draft + length * cache_bytes(pair.draft))
    return read / session.bandwidth


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
