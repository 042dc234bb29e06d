"""The model card of a draft: how it was trained, and its acceptance."""

from collections.abc import Mapping

import torch
import transformers

import mcsd
from mcsd.distill.corpus import Corpus
from mcsd.distill.trainer import DraftAcceptance, TrainingReport


def card(
    target: str, command: str, settings: Mapping[str, object], report: TrainingReport, corpus: Corpus, parameters: int
) -> str:
    """The model card, as Markdown.

    Args:
        target: the target of the draft.
        command: the command line that reproduces it.
        settings: of the run.
        report: the last one of training.
        corpus: the training text.
        parameters: number of trained parameters.
    """
    table = "\n".join(f"| {name} | `{value}` |" for name, value in settings.items())
    return f"""# A draft for {target}

Made by mcsd {mcsd.__version__} (torch {torch.__version__}, transformers {transformers.__version__}) with

    {command}

Use it with `mcsd generate --target {target} --draft FOLDER`. It changes the speed of {target}, not its
output distribution.

## Acceptance on held-out text

{acceptance_table(report.acceptance)}

At temperature 1: the probability that one candidate is accepted. At temperature 0: the fraction of tokens that are the
draft's top-1, or in its top-4. Step n reads the draft's own output of step n - 1, along the target's text.

## Training

{parameters / 1e6:.2f} million trained parameters, {report.step} steps in {report.seconds / 60:.1f} minutes.
{len(corpus.lengths)} texts with {corpus.tokens} tokens that {target} generated or read, one in twenty held out
(at most 64).

| setting | value |
|---|---|
{table}
"""


def acceptance_table(acceptance: DraftAcceptance) -> str:
    """A Markdown table with a row for each step ahead."""
    rows = zip(acceptance.sampled, acceptance.greedy, acceptance.greedy4, strict=True)
    lines = [
        f"| {step} | {sampled:.3f} | {first:.3f} | {four:.3f} |" for step, (sampled, first, four) in enumerate(rows, 1)
    ]
    head = "| step | temperature 1 | temperature 0, top-1 | temperature 0, top-4 |\n|---|---|---|---|"
    return "\n".join([head, *lines])
