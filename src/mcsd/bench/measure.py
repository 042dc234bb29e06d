"""An experiment from its beginning, or from where it was broken off, to its figures."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mcsd.bench.acceptance import COMPARED, DRAWS, WIDEST, accepted_within, read
from mcsd.bench.attention import ROUNDS, Verification, comparable
from mcsd.bench.contestants import Contestants
from mcsd.bench.experiment import DRAFT, MULTI, PLAIN, TUNED, Experiment, System
from mcsd.bench.grid import LOSSLESS
from mcsd.bench.journal import Accepted, Answered, Journal, Verified
from mcsd.bench.manifest import machine, versions
from mcsd.bench.plan import plan
from mcsd.bench.prompts import encoded
from mcsd.bench.results import Results, acceptances, attentions, speeds
from mcsd.bench.weights import Models
from mcsd.encoding import Encoder
from mcsd.engine import Engine
from mcsd.errors import InvalidOption
from mcsd.files import alone, same_settings
from mcsd.options import check_options
from mcsd.params import SamplingParams

MANIFEST, REQUESTS, ACCEPTANCE, ATTENTION = "manifest.json", "requests.jsonl", "acceptance.jsonl", "attention.jsonl"

_CONTEXT = 128
"""Tokens that stand before a tree when its forward is timed."""

Show = Callable[[str], None]
Prompts = Mapping[str, Sequence[str | list[int]]]
Encoded = Mapping[str, Sequence[list[int]]]


def measure(
    models: Models,
    prompts: Prompts,
    experiment: Experiment,
    out: Path,
    max_length: int,
    about: Mapping[str, Any] | None = None,
    show: Show = lambda line: None,
) -> Results:
    """Measure, or go on measuring; see `mcsd.bench.bench`, which also writes what people read."""
    ids = _encode(models, prompts, experiment.max_new_tokens, max_length)
    jobs = plan(experiment, {name: len(texts) for name, texts in ids.items()})
    manifest = _manifest(models, ids, experiment, about or {})
    same_settings(out / MANIFEST, manifest)
    with alone(out / MANIFEST):
        answered, accepted = Journal(out / REQUESTS, Answered), Journal(out / ACCEPTANCE, Accepted)
        verified = Journal(out / ATTENTION, Verified)
        contestants = Contestants(models, ids, experiment.max_new_tokens, max(experiment.batch_sizes))
        for number, job in enumerate(jobs):
            if job.key not in answered:
                show(f"request {number + 1} of {len(jobs)}: {job.system.name} at temperature {job.temperature:g}")
                answered.append(contestants.run(job))
        _accept(contestants, models, ids, answered.entries, accepted, show)
        _verify(models, ids, experiment, verified, show)
    return Results(
        tuple(speeds(answered.entries)),
        tuple(acceptances(accepted.entries)),
        tuple(attentions(verified.entries)),
        manifest,
    )


def _encode(models: Models, prompts: Prompts, new: int, max_length: int) -> dict[str, list[list[int]]]:
    target = models.target
    room = min(max_length, target.max_length or max_length) - new
    if room < 1:
        raise InvalidOption(f"no room for a prompt and {new} new tokens", "raise max_length, or lower max_new_tokens")
    encoder = Encoder(models.tokenizer, target.name, target.vocab_size, room + 1)
    return encoded(prompts, encoder)


def _manifest(models: Models, ids: Encoded, experiment: Experiment, about: Mapping[str, Any]) -> dict[str, Any]:
    asked = {
        name: {"count": len(texts), "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        for name, texts in ids.items()
    }
    manifest = {
        "experiment": asdict(experiment),
        "prompts": asked,
        "versions": versions(),
        "machine": machine(models.target.device),
        **about,
    }
    # As it will be read again: lists for tuples.
    return dict(json.loads(json.dumps(manifest)))


def _accept(
    contestants: Contestants,
    models: Models,
    ids: Encoded,
    answered: Sequence[Answered],
    accepted: Journal[Accepted],
    show: Show,
) -> None:
    """Acceptance along the texts of plain decoding, those of the smallest batch and the first repeat."""
    plain = [entry for entry in answered if entry.role == PLAIN and entry.repeat == 0]
    smallest = min(len(entry.numbers) for entry in plain)
    texts = [
        (entry, number, tokens)
        for entry in plain
        if len(entry.numbers) == smallest
        for number, tokens in zip(entry.numbers, entry.token_ids, strict=True)
    ]
    for draft in (label for label in (DRAFT, TUNED) if label in models.drafts):
        engine = contestants.engine(System(MULTI, draft, str(WIDEST), LOSSLESS), DRAWS)
        for place, (entry, number, tokens) in enumerate(texts):
            show(f"acceptance of the {draft}: text {place + 1} of {len(texts)}")
            prompt = ids[entry.prompts][number]
            _accept_text(engine, prompt, list(tokens), (draft, entry.prompts, number, entry.temperature), accepted)


def _accept_text(
    engine: Engine,
    prompt: list[int],
    tokens: list[int],
    where: tuple[str, str, int, float],
    accepted: Journal[Accepted],
) -> None:
    draft, prompts, number, temperature = where
    drawn = engine.drafter.draws and temperature > 0
    schemes = COMPARED if drawn else ("top-k",)
    missing = [scheme for scheme in schemes if (draft, scheme, prompts, number, temperature) not in accepted]
    if not missing:
        return
    answer, draws = read(engine, prompt, tokens), DRAWS if drawn else 1
    for scheme in missing:
        within = accepted_within(engine, answer, SamplingParams(temperature=temperature), scheme, draws)
        accepted.append(Accepted(draft, scheme, prompts, number, temperature, draws * len(tokens), within))


def _verify(models: Models, ids: Encoded, experiment: Experiment, verified: Journal[Verified], show: Show) -> None:
    """Tree attention against a batch of paths, for every tree with branches that an experiment has."""
    shapes = {
        system.tree: check_options(system.scheme, system.tree, 1, 1) for system in experiment.systems if system.tree
    }
    prompt = next(iter(ids.values()))[0]
    text = (prompt * _CONTEXT)[: min(_CONTEXT, models.target.max_length or _CONTEXT)]
    for tree, shape in shapes.items():
        missing = [round for round in range(ROUNDS) if (tree, round) not in verified]
        if shape is None or not comparable(shape) or not missing:
            continue
        show(f"tree attention: {tree}")
        verification = Verification(models.target, text, shape)
        verification.measure(tree, 0)
        for round in missing:
            verified.append(verification.measure(tree, round))
