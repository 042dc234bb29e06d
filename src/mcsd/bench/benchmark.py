"""``mcsd bench`` from models and prompts to a report on disk."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcsd.bench.bench_models import BenchModels
from mcsd.bench.experiment import Experiment
from mcsd.bench.measure import Progress, Prompts, measure
from mcsd.bench.report import write_report
from mcsd.bench.results import Results, flatten
from mcsd.files import atomic_path

REPORT = "report.html"


def bench(
    models: BenchModels,
    prompts: Prompts,
    experiment: Experiment,
    out: Path,
    max_length: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda line: None,
) -> Results:
    """Run an experiment, or resume it, and write tables, figures and the report.

    A baseline that these models cannot run is left out; the report and `Results.left_out` say why.

    Args:
        models: loaded.
        prompts: sets of texts or token ids, by name. The target's chat template, if any, is applied to texts.
        experiment: what is measured.
        out: a folder. What it holds already is not measured again; it must belong to the same experiment, versions and
            machine.
        max_length: the most tokens of a prompt and its answer; by default the target's context.
        provenance: what else must be the same to resume, and is shown in the report: models, how they were loaded.
        progress: takes a line about the progress.

    Raises:
        InvalidOption: a batch is larger than a set of prompts, a peer does not answer, or the folder belongs to another
            experiment.
        RequestError: a prompt is wrong.
        OutputFailed, DataError: the folder cannot be written, or holds something else.
    """
    results = measure(models, prompts, experiment, out, max_length, provenance, progress)
    _write_csv(out / "summary.csv", [flatten(row) for row in results.speeds])
    _write_csv(out / "acceptance.csv", [flatten(row) for row in results.acceptances])
    _write_csv(out / "attention.csv", [flatten(row) for row in results.attentions])
    write_report(results, out / REPORT)
    return results


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
