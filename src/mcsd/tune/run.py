"""``mcsd tune``: measure a pair on this machine, run the best trees against each other, keep what was found."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from mcsd.catalog import default_draft
from mcsd.engine import Engine
from mcsd.errors import InvalidOption
from mcsd.models.loading import load_pair
from mcsd.options import check_options
from mcsd.params import SamplingParams
from mcsd.planning import TEMPERATURES, Calibration, FixedTree, Place, Plan, Profile, forward_curve, place_of
from mcsd.planning.calibration import Step
from mcsd.planning.search import LARGEST
from mcsd.prompts import usual
from mcsd.schemes import SCHEMES
from mcsd.tree import TreeShape
from mcsd.tune.contenders import Entrant, entrants
from mcsd.tune.log import Log
from mcsd.tune.report import Contender, Race, Report

_TRYING = 0.35
"""Share of the budget that goes into measuring the parts; the races have the rest."""

_TRY = SamplingParams(max_new_tokens=48)
"""A request by which parts are measured."""

_RACED = 64
"""New tokens of a request, when trees run against each other."""

_WARMING = 8
"""New tokens of a request that only warms up."""

_RANKS = 4
"""Candidates whose acceptance is reported."""

_ROWS = (1, 4)
"""Of the forwards that are timed: trees of several rows share one forward."""


@dataclass(frozen=True)
class Options:
    """What to tune, and for how long. The names are those of `mcsd.Engine.load`.

    Attributes:
        target, draft, scheme, device, dtype, quantize, compile, max_length: as there.
        minutes: for all of it. However few, every tree answers one prompt at each temperature.

    Raises:
        InvalidOption, UnknownScheme: a value outside its range.
    """

    target: str
    draft: str | None = None
    scheme: str = "mcss-wor"
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    compile: bool = False
    max_length: int = 2048
    minutes: float = 10.0

    def __post_init__(self) -> None:
        check_options(self.scheme, "auto", 1, self.max_length)
        if not (isfinite(self.minutes) and self.minutes > 0):
            raise InvalidOption(f"minutes={self.minutes} is not a number above 0", "give the minutes that it may take")


class Pair:
    """The models of a run, and engines that share them.

    Attributes:
        draws: whether candidates are drawn.
        place: where the profile is kept.
    """

    def __init__(self, options: Options) -> None:
        draft = options.draft or default_draft(options.target)
        setting = options.quantize, options.compile
        self._target, self._draft = load_pair(options.target, draft, options.device, options.dtype, *setting)
        self.draws = draft != "ngram"
        self._max_length = options.max_length
        self._racing: dict[str, tuple[Engine, FixedTree]] = {}
        self.place: Place = place_of(
            options.target,
            draft,
            self._target.model,
            scheme=options.scheme,
            quantize=options.quantize,
            compile=options.compile,
        )

    def engine(self, plan: Plan, scheme: str) -> Engine:
        """An engine of one row."""
        target = self._target
        return Engine(target.model, self._draft, target.tokenizer, plan, scheme, 1, self._max_length)

    def run(self, entrant: Entrant, prompt: list[int], temperature: float, new: int, seed: int) -> dict[str, Any]:
        """Let an entrant answer a prompt; the time that reading the prompt takes is left out."""
        if entrant.scheme not in self._racing:
            plan = FixedTree(entrant.choice.shape, LARGEST)
            self._racing[entrant.scheme] = self.engine(plan, entrant.scheme), plan
        engine, plan = self._racing[entrant.scheme]
        plan.shape = entrant.choice.shape
        params = SamplingParams(temperature=temperature, max_new_tokens=new, seed=seed)
        stats = engine.generate([prompt], params)[0].stats
        seconds = sum(stats.seconds.values()) - stats.seconds["prefill"]
        return {"tokens": stats.new_tokens, "calls": stats.target_calls, "seconds": seconds}


def tune(options: Options, prompts: Sequence[str] | None, show: Callable[[str], None]) -> Report:
    """Find the tree that pays, and keep what tree "auto" needs to know.

    A run that is broken off is gone on with by the next one of the same options: at most the request in flight is lost.

    Args:
        options: what to tune.
        prompts: to answer; None: built-in ones.
        show: takes a line about how far it has come.

    Raises:
        ModelError, OptionError: see `mcsd.Engine.load`.
        RequestError: a prompt is wrong.
        OutputFailed: the profile cannot be written.
    """
    begun = time.monotonic()
    pair = Pair(options)
    with Log(pair.place.path.with_suffix(".tuning.jsonl")) as log:
        report = _tuned(options, pair, prompts, log, begun, show)
        log.delete()
    return report


def _tuned(
    options: Options,
    pair: Pair,
    prompts: Sequence[str] | None,
    log: Log,
    begun: float,
    show: Callable[[str], None],
) -> Report:
    trial = Calibration(SCHEMES[options.scheme], pair.draws)
    engine = pair.engine(trial, options.scheme)
    encoder = engine.encoder
    ids = usual(encoder) if prompts is None else [encoder.ask(prompt) for prompt in prompts]
    log.begin({**pair.place.key, "prompts": ids})
    end = begun + 60 * options.minutes - sum(entry["wall"] for entry in log.entries)
    profile = _parts(engine, trial, ids, log, begun + _TRYING * (end - begun), show)
    fields = {temperature: entrants(profile, options.scheme, temperature, pair.draws) for temperature in TEMPERATURES}
    _race(pair, fields, ids, log, end, show)
    races = tuple(_result(temperature, fields[temperature], profile, log) for temperature in TEMPERATURES)
    report = Report(engine.target_name, engine.draft_name, options.scheme, profile.costs, races, pair.place.path)
    tree = TreeShape.parse(races[0].winner(options.scheme).tree)
    pair.place.write(replace(profile, tree=tree, findings=report.findings()))
    return report


def _parts(
    engine: Engine, trial: Calibration, prompts: list[list[int]], log: Log, end: float, show: Callable[[str], None]
) -> Profile:
    """Measure what forwards cost, what drafting costs and what is accepted."""
    done = set()
    for entry in log.entries:
        if entry["kind"] == "steps":
            trial.steps += [Step.of_list(step) for step in entry["steps"]]
            done.add((entry["prompt"], entry["temperature"]))
        if entry["kind"] == "forwards":
            return trial.profile(tuple((tokens, seconds) for tokens, seconds in entry["curve"]))
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            break
        for temperature in TEMPERATURES:
            if (number, temperature) in done:
                continue
            show(f"measuring: prompt {number + 1} of up to {len(prompts)} at temperature {temperature:g}")
            begun, before = time.monotonic(), len(trial.steps)
            engine.generate([prompt], replace(_TRY, temperature=temperature, seed=number))
            entry = {"kind": "steps", "prompt": number, "temperature": temperature, "steps": trial.steps[before:]}
            log.add({**entry, "wall": time.monotonic() - begun})
    show("measuring forwards")
    begun = time.monotonic()
    curve = forward_curve(engine.target, engine.drafter.hidden, _ROWS)
    log.add({"kind": "forwards", "curve": curve, "wall": time.monotonic() - begun})
    return trial.profile(curve)


def _race(
    pair: Pair,
    fields: Mapping[float, list[Entrant]],
    prompts: list[list[int]],
    log: Log,
    end: float,
    show: Callable[[str], None],
) -> None:
    """Let all entrants answer one prompt after the other, in turns, until the time is up."""
    done = {(e["prompt"], e["temperature"], e["name"]) for e in log.entries if e["kind"] == "race"}
    warm: set[str] = set()
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            return
        for temperature, field in fields.items():
            # Each one runs in each place.
            turn = number % len(field)
            for entrant in field[turn:] + field[:turn]:
                if (number, temperature, entrant.name) in done:
                    continue
                show(f"prompt {number + 1} of up to {len(prompts)} at temperature {temperature:g}: {entrant.name}")
                begun = time.monotonic()
                if entrant.name not in warm:
                    pair.run(entrant, prompt, temperature, _WARMING, number)
                    warm.add(entrant.name)
                entry = pair.run(entrant, prompt, temperature, _RACED, number)
                log.add(
                    {"kind": "race", "prompt": number, "temperature": temperature, "name": entrant.name}
                    | {**entry, "wall": time.monotonic() - begun}
                )


def _result(temperature: float, field: Sequence[Entrant], profile: Profile, log: Log) -> Race:
    entries = [e for e in log.entries if e["kind"] == "race" and e["temperature"] == temperature]
    runs = {entrant.name: {e["prompt"]: e for e in entries if e["name"] == entrant.name} for entrant in field}
    prompts = sorted(set.intersection(*(set(each) for each in runs.values())))
    plain = runs[field[0].name]
    contenders = []
    for entrant in field:
        run = runs[entrant.name]
        ratios = [_rate([run[i]]) / _rate([plain[i]]) for i in prompts]
        measured, base = (_rate([each[i] for i in prompts]) for each in (run, plain))
        contenders.append(
            Contender(
                entrant.scheme,
                str(entrant.choice.shape),
                entrant.choice.rate,
                measured,
                measured / base,
                min(ratios),
                max(ratios),
                sum(run[i]["tokens"] for i in prompts) / sum(run[i]["calls"] for i in prompts),
            )
        )
    rates = profile.sampled if temperature else profile.greedy
    return Race(temperature, len(prompts), rates[0][:_RANKS], tuple(contenders))


def _rate(runs: Sequence[Mapping[str, Any]]) -> float:
    """Tokens a second of all together."""
    return float(sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs))
