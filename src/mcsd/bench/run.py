"""``mcsd bench`` from models and prompts to a report on disk."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcsd.bench.experiment import Experiment
from mcsd.bench.figures import check_matplotlib
from mcsd.bench.measure import Prompts, Show, measure
from mcsd.bench.report import write_report
from mcsd.bench.results import Results, flat
from mcsd.bench.weights import Models
from mcsd.files import replacing

REPORT = "report.html"


def bench(
    models: Models,
    prompts: Prompts,
    experiment: Experiment,
    out: Path,
    max_length: int = 2048,
    about: Mapping[str, Any] | None = None,
    show: Show = lambda line: None,
) -> Results:
    """Measure, or go on measuring, and write tables, figures and the report.

    Args:
        models: loaded.
        prompts: sets of texts or token ids, by name. Texts are asked in the target's chat template, if it has one.
        experiment: what is measured.
        out: a folder. Whatever is in it already is not measured again; it must be of the same experiment, versions and
            machine.
        max_length: the most tokens of a prompt and its answer.
        about: more that must be the same, and is told in the report: weights, how they were loaded.
        show: takes a line about how far it has come.

    Raises:
        InvalidOption: a batch is larger than a set of prompts, or the folder is of another experiment.
        RequestError: a prompt is wrong.
        MissingPackage: figures cannot be drawn.
        OutputFailed, DataError: the folder cannot be written, or holds something else.
    """
    check_matplotlib()
    results = measure(models, prompts, experiment, out, max_length, about, show)
    _write_csv(out / "summary.csv", [flat(row) for row in results.speeds])
    _write_csv(out / "acceptance.csv", [flat(row) for row in results.acceptances])
    _write_csv(out / "attention.csv", [flat(row) for row in results.attentions])
    write_report(results, out / REPORT)
    return results


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
