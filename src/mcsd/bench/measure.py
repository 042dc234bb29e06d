"""Runs an experiment, or resumes one, and computes its results."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mcsd.bench.acceptance import COMPARED_SCHEMES, DRAWS, MAX_CANDIDATES, count_accepted, score_answer
from mcsd.bench.attention import REPEATS, AttentionBenchmark, has_paths_to_compare
from mcsd.bench.bench_models import BenchModels
from mcsd.bench.experiment import DRAFT, MULTI, PLAIN, TUNED, Experiment, System, tree_name
from mcsd.bench.grid import DEFAULT_SCHEME
from mcsd.bench.manifest import machine, versions
from mcsd.bench.records import AcceptanceRecord, AttentionRecord, RequestRecord
from mcsd.bench.results import LEFT_OUT, Results, acceptance_rows, attention_rows, speed_rows
from mcsd.bench.runners import JobRunner
from mcsd.bench.schedule import schedule_jobs
from mcsd.config import parse_tree
from mcsd.engine import Engine
from mcsd.errors import InvalidOption
from mcsd.files import VERSION, JsonlLog, check_settings, exclusive_lock
from mcsd.params import SamplingParams
from mcsd.prompts import encode_prompt_sets
from mcsd.request_queue import request_length
from mcsd.tokenization import PromptEncoder
from mcsd.tree import TreeShape

MANIFEST, REQUESTS, ACCEPTANCE, ATTENTION = "manifest.json", "requests.jsonl", "acceptance.jsonl", "attention.jsonl"

_FORMAT = 3
"""Of the files in the folder. Folders of another format are refused."""

_CONTEXT = 128
"""Tokens before the tree when its forward is timed."""

Progress = Callable[[str], None]
Prompts = Mapping[str, Sequence[str | list[int]]]
PromptTokens = Mapping[str, Sequence[list[int]]]


def measure(
    models: BenchModels,
    prompts: Prompts,
    experiment: Experiment,
    out: Path,
    max_length: int | None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda line: None,
) -> Results:
    """Run an experiment, or resume it; see `mcsd.bench.bench`, which also writes tables and the report."""
    ids = _encode(models, prompts, experiment.max_new_tokens, max_length)
    sizes = {name: len(texts) for name, texts in ids.items()}
    schedule_jobs(experiment, sizes)  # Wrong sizes are an error before a baseline is tried.
    left_out = models.left_out(experiment.systems, experiment.batch_sizes, next(iter(ids.values()))[0])
    kept = tuple(system for system in experiment.systems if system.name not in left_out)
    experiment = replace(experiment, systems=kept)
    jobs = schedule_jobs(experiment, sizes)
    manifest = _manifest(models, ids, experiment, left_out, provenance or {})
    check_settings(out / MANIFEST, manifest)
    with exclusive_lock(out / MANIFEST):
        requests = JsonlLog(out / REQUESTS, lambda value: RequestRecord(**value))
        acceptance = JsonlLog(out / ACCEPTANCE, lambda value: AcceptanceRecord(**value))
        attention = JsonlLog(out / ATTENTION, lambda value: AttentionRecord(**value))
        done = {record.key for record in requests.records}
        runner = JobRunner(models, ids, experiment.max_new_tokens, max(experiment.batch_sizes))
        for number, job in enumerate(jobs, 1):
            if job.key not in done:
                progress(f"request {number} of {len(jobs)}: {job.system.name} at temperature {job.temperature:g}")
                requests.append(runner.run(job))
        _measure_acceptance(runner, models, ids, requests.records, acceptance, progress)
        _measure_attention(models, ids, experiment, attention, progress)
    return Results(
        tuple(speed_rows(requests.records)),
        tuple(acceptance_rows(acceptance.records)),
        tuple(attention_rows(attention.records)),
        manifest,
    )


def _encode(
    models: BenchModels, prompts: Prompts, max_new_tokens: int, max_length: int | None
) -> dict[str, list[list[int]]]:
    target = models.target
    max_prompt = request_length(max_length, target) - max_new_tokens
    if max_prompt < 1:
        raise InvalidOption(
            f"max_length leaves no prompt beside {max_new_tokens} new tokens",
            "raise max_length, or lower max_new_tokens",
        )
    encoder = PromptEncoder(models.tokenizer, target.name, target.vocab_size, max_prompt + 1)
    return encode_prompt_sets(prompts, encoder)


def _manifest(
    models: BenchModels,
    ids: PromptTokens,
    experiment: Experiment,
    left_out: Mapping[str, str],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    asked = {
        name: {"count": len(texts), "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        for name, texts in ids.items()
    }
    manifest = {
        VERSION: _FORMAT,
        "experiment": asdict(experiment),
        LEFT_OUT: left_out,
        "trees": {name: shape.parents for name, shape in _shapes(experiment).items()},
        "prompts": asked,
        "versions": versions(),
        "machine": machine(models.target.device),
        **provenance,
    }
    # JSON has lists in place of tuples: it must equal the manifest on disk.
    return dict(json.loads(json.dumps(manifest)))


def _shapes(experiment: Experiment) -> dict[str, TreeShape]:
    """The trees of an experiment by name; "auto" is none."""
    shapes = {
        tree_name(system.tree): parse_tree(system.scheme, system.tree) for system in experiment.systems if system.tree
    }
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _measure_acceptance(
    runner: JobRunner,
    models: BenchModels,
    ids: PromptTokens,
    requests: Sequence[RequestRecord],
    log: JsonlLog[AcceptanceRecord],
    progress: Progress,
) -> None:
    """Acceptance along the texts of plain decoding, of the smallest batch and the first repeat."""
    plain = [record for record in requests if record.role == PLAIN and record.repeat == 0]
    smallest = min(len(record.numbers) for record in plain)
    texts = [
        (record, number, tokens)
        for record in plain
        if len(record.numbers) == smallest
        for number, tokens in zip(record.numbers, record.token_ids, strict=True)
    ]
    for draft in (label for label in (DRAFT, TUNED) if label in models.drafts):
        engine = runner.engine(System(MULTI, draft, str(MAX_CANDIDATES), DEFAULT_SCHEME), DRAWS)
        for index, (record, number, tokens) in enumerate(texts, 1):
            progress(f"acceptance of the {draft}: text {index} of {len(texts)}")
            prompt = ids[record.prompts][number]
            _measure_text(engine, prompt, list(tokens), (draft, record.prompts, number, record.temperature), log)


def _measure_text(
    engine: Engine,
    prompt: list[int],
    answer: list[int],
    where: tuple[str, str, int, float],
    log: JsonlLog[AcceptanceRecord],
) -> None:
    draft, prompts, number, temperature = where
    is_sampled = engine.drafter.is_sampled and temperature > 0
    schemes = COMPARED_SCHEMES if is_sampled else ("top-k",)
    done = {record.key for record in log.records}
    missing = [scheme for scheme in schemes if (draft, scheme, prompts, number, temperature) not in done]
    if not missing:
        return
    text, draws = score_answer(engine, prompt, answer), DRAWS if is_sampled else 1
    for scheme in missing:
        within = count_accepted(engine, text, SamplingParams(temperature=temperature), scheme, draws)
        log.append(AcceptanceRecord(draft, scheme, prompts, number, temperature, draws * len(answer), within))


def _measure_attention(
    models: BenchModels,
    ids: PromptTokens,
    experiment: Experiment,
    log: JsonlLog[AttentionRecord],
    progress: Progress,
) -> None:
    """Tree attention against a batch of paths, for every tree with branches of an experiment."""
    prompt = next(iter(ids.values()))[0]
    text = (prompt * _CONTEXT)[: min(_CONTEXT, models.target.max_length or _CONTEXT)]
    done = {record.key for record in log.records}
    for tree, shape in _shapes(experiment).items():
        missing = [repeat for repeat in range(REPEATS) if (tree, repeat) not in done]
        if not has_paths_to_compare(shape) or not missing:
            continue
        progress(f"tree attention: {tree}")
        benchmark = AttentionBenchmark(models.target, text, shape)
        benchmark.measure(tree, 0)
        for repeat in missing:
            log.append(benchmark.measure(tree, repeat))
