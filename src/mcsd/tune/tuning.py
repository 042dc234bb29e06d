"""``mcsd tune``: measure the costs of a pair on this machine, compare the best trees, and write the profile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mcsd.core import EngineCore
from mcsd.drafters.make import cache_slots, make_drafter
from mcsd.files import JsonlLog, exclusive_lock
from mcsd.loading.load import load_pair
from mcsd.params import SamplingParams
from mcsd.planning import (
    TEMPERATURES,
    FixedTree,
    Plan,
    Profile,
    ProfileFile,
    TrialPlan,
    measure_forwards,
    profile_file,
)
from mcsd.planning.search import MAX_NODES
from mcsd.planning.trials import TrialStep
from mcsd.prompts import default_prompts
from mcsd.request_queue import request_length
from mcsd.tree import TreeShape
from mcsd.tune.configurations import Configuration, configurations
from mcsd.tune.options import TuneOptions
from mcsd.tune.report import ConfigurationComparison, ConfigurationResult, TuneReport

_CALIBRATION_SHARE = 0.35
"""Share of the time that goes into measuring costs; the comparisons have the rest."""

_CALIBRATION_REQUEST = SamplingParams(max_new_tokens=48)

_COMPARISON_TOKENS = 64
"""New tokens of a request in a comparison."""

_WARM_UP_TOKENS = 8

_REPORTED_RANKS = 4
"""Candidates whose acceptance is reported."""

_BATCH_SIZES = (1, 4)
"""Of the forwards that are timed: the trees of a batch share one forward."""

_LOG_FORMAT = 2
"""Logs of another format start anew."""

_LOG_FIELDS = {
    "steps": {"kind", "prompt", "temperature", "steps", "wall"},
    "forwards": {"kind", "curve", "wall"},
    "comparison": {"kind", "prompt", "temperature", "name", "tokens", "calls", "seconds", "wall"},
}
"""Of the records, by kind."""

Log = JsonlLog[dict[str, Any]]


class ModelPair:
    """The models of a run, and engines that share them.

    Attributes:
        is_sampled: whether candidates are sampled.
        profile_file: where the profile is written.
    """

    def __init__(self, options: TuneOptions) -> None:
        self._pair = load_pair(options)
        self.is_sampled = self._pair.draft != "ngram"
        self._max_length = options.max_length
        self._engines: dict[str, tuple[EngineCore, FixedTree]] = {}
        self.profile_file: ProfileFile = profile_file(self._pair.target.model, self._pair.draft, options.scheme)

    def engine(self, plan: Plan, scheme: str) -> EngineCore:
        """An engine for batches of one."""
        target, tokenizer = self._pair.target.model, self._pair.target.tokenizer
        length = request_length(self._max_length, target)
        drafter = make_drafter(self._pair.draft, target, tokenizer, 1, cache_slots(length, plan.max_nodes))
        return EngineCore(target, drafter, scheme, plan, plan.max_nodes, tokenizer, 1, length)

    def run(
        self, configuration: Configuration, prompt: list[int], temperature: float, max_new_tokens: int, seed: int
    ) -> dict[str, Any]:
        """Answer a prompt with a configuration: tokens, target calls, and seconds without prefill."""
        if configuration.scheme not in self._engines:
            plan = FixedTree(configuration.choice.shape, MAX_NODES)
            self._engines[configuration.scheme] = self.engine(plan, configuration.scheme), plan
        engine, plan = self._engines[configuration.scheme]
        plan.shape = configuration.choice.shape
        params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        stats = engine.run([engine.request(prompt, params)])[0].stats
        seconds = sum(stats.seconds.values()) - stats.seconds["prefill"]
        return {"tokens": stats.new_tokens, "calls": stats.target_calls, "seconds": seconds}


def tune(options: TuneOptions, prompts: Sequence[str] | None, progress: Callable[[str], None]) -> TuneReport:
    """Find the fastest tree, and write the profile that tree "auto" reads.

    The next run with the same options resumes an interrupted one: at most the request in flight is lost.

    Args:
        options: what to tune.
        prompts: to answer; None: built-in ones.
        progress: takes a line about the progress.

    Raises:
        ModelError, OptionError: see `mcsd.Engine.load`; or another process tunes the same pair.
        RequestError: a prompt is wrong.
        OutputFailed: the profile cannot be written.
    """
    start = time.monotonic()
    pair = ModelPair(options)
    path = pair.profile_file.path.with_suffix(".tuning.jsonl")
    lock = path.with_name(f".{path.name}.lock")
    with exclusive_lock(lock):
        try:
            trial = TrialPlan(options.scheme, pair.is_sampled)
            engine = pair.engine(trial, options.scheme)
            encoder = engine.encoder
            if prompts is None:
                ids = default_prompts(encoder)
            else:
                ids = [encoder.encode_question(prompt) for prompt in prompts]
            log = JsonlLog(path, _parse, {"format": _LOG_FORMAT, **pair.profile_file.key, "prompts": ids})
            report = _tune(options, pair, engine, trial, ids, log, start, progress)
            path.unlink(missing_ok=True)
        finally:
            if not path.exists():
                lock.unlink(missing_ok=True)
    return report


def _parse(value: Any) -> dict[str, Any]:
    """A record of the log: see `_LOG_FIELDS`."""
    if not isinstance(value, dict) or set(value) != _LOG_FIELDS.get(str(value.get("kind"))):
        raise ValueError("not a record")
    return value


def _tune(
    options: TuneOptions,
    pair: ModelPair,
    engine: EngineCore,
    trial: TrialPlan,
    prompts: list[list[int]],
    log: Log,
    start: float,
    progress: Callable[[str], None],
) -> TuneReport:
    end = start + 60 * options.minutes - sum(record["wall"] for record in log.records)
    profile = _measure_profile(engine, trial, prompts, log, start + _CALIBRATION_SHARE * (end - start), progress)
    compared = {
        temperature: configurations(profile, options.scheme, temperature, pair.is_sampled)
        for temperature in TEMPERATURES
    }
    _run_comparisons(pair, compared, prompts, log, end, progress)
    comparisons = tuple(_comparison(temperature, compared[temperature], profile, log) for temperature in TEMPERATURES)
    names = engine.target_name, engine.drafter.name, options.scheme
    report = TuneReport(*names, profile.costs, comparisons, pair.profile_file.path)
    tree = TreeShape.parse(comparisons[0].best(options.scheme).tree)
    pair.profile_file.write(replace(profile, tree=tree, findings=report.findings()))
    return report


def _measure_profile(
    engine: EngineCore,
    trial: TrialPlan,
    prompts: list[list[int]],
    log: Log,
    end: float,
    progress: Callable[[str], None],
) -> Profile:
    """Measure the costs of forwards and of drafting, and the rates of acceptance."""
    done = set()
    for record in log.records:
        if record["kind"] == "steps":
            trial.steps += [TrialStep.from_json(step) for step in record["steps"]]
            done.add((record["prompt"], record["temperature"]))
        if record["kind"] == "forwards":
            return trial.profile(tuple((tokens, seconds) for tokens, seconds in record["curve"]))
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            break
        for temperature in TEMPERATURES:
            if (number, temperature) in done:
                continue
            progress(f"measuring: prompt {number + 1} of up to {len(prompts)} at temperature {temperature:g}")
            start, before = time.monotonic(), len(trial.steps)
            params = replace(_CALIBRATION_REQUEST, temperature=temperature, seed=number)
            engine.run([engine.request(prompt, params)])
            steps = trial.steps[before:]
            record = {"kind": "steps", "prompt": number, "temperature": temperature, "steps": steps}
            log.append({**record, "wall": time.monotonic() - start})
    progress("measuring forwards")
    start = time.monotonic()
    curve = measure_forwards(engine.target, engine.drafter.hidden_layers, _BATCH_SIZES)
    log.append({"kind": "forwards", "curve": curve, "wall": time.monotonic() - start})
    return trial.profile(curve)


def _run_comparisons(
    pair: ModelPair,
    compared: Mapping[float, list[Configuration]],
    prompts: list[list[int]],
    log: Log,
    end: float,
    progress: Callable[[str], None],
) -> None:
    """Answer one prompt after the other with all configurations, interleaved, until the time is up."""
    done = {(r["prompt"], r["temperature"], r["name"]) for r in log.records if r["kind"] == "comparison"}
    warm: set[str] = set()
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            return
        for temperature, here in compared.items():
            # The order rotates: which one ran before affects caches and clock rates.
            first = number % len(here)
            for configuration in here[first:] + here[:first]:
                name = configuration.name
                if (number, temperature, name) in done:
                    continue
                progress(f"prompt {number + 1} of up to {len(prompts)} at temperature {temperature:g}: {name}")
                start = time.monotonic()
                if name not in warm:
                    pair.run(configuration, prompt, temperature, _WARM_UP_TOKENS, number)
                    warm.add(name)
                measured = pair.run(configuration, prompt, temperature, _COMPARISON_TOKENS, number)
                record = {"kind": "comparison", "prompt": number, "temperature": temperature, "name": name}
                log.append({**record, **measured, "wall": time.monotonic() - start})


def _comparison(
    temperature: float, compared: Sequence[Configuration], profile: Profile, log: Log
) -> ConfigurationComparison:
    records = [r for r in log.records if r["kind"] == "comparison" and r["temperature"] == temperature]
    runs = {
        configuration.name: {r["prompt"]: r for r in records if r["name"] == configuration.name}
        for configuration in compared
    }
    prompts = sorted(set.intersection(*(set(each) for each in runs.values())))
    plain = runs[compared[0].name]
    results = []
    for configuration in compared:
        run = runs[configuration.name]
        ratios = [_tokens_per_second([run[i]]) / _tokens_per_second([plain[i]]) for i in prompts]
        measured, base = (_tokens_per_second([each[i] for i in prompts]) for each in (run, plain))
        results.append(
            ConfigurationResult(
                configuration.scheme,
                str(configuration.choice.shape),
                configuration.choice.rate,
                measured,
                measured / base,
                min(ratios),
                max(ratios),
                sum(run[i]["tokens"] for i in prompts) / sum(run[i]["calls"] for i in prompts),
            )
        )
    rates = profile.sampled if temperature else profile.greedy
    return ConfigurationComparison(temperature, len(prompts), rates[0][:_REPORTED_RANKS], tuple(results))


def _tokens_per_second(runs: Sequence[Mapping[str, Any]]) -> float:
    """Of all runs together."""
    return float(sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs))
