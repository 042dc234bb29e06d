"""The model card of a draft: what it was made of, with what, and how well it drafts."""

from collections.abc import Mapping

import torch
import transformers

import mcsd
from mcsd.distill.corpus import Corpus
from mcsd.distill.trainer import Acceptance, Report


def card(
    target: str, command: str, settings: Mapping[str, object], report: Report, corpus: Corpus, parameters: int
) -> str:
    """Markdown.

    Args:
        target: whose draft it is.
        command: that makes it again.
        settings: of the run.
        report: the last one of training.
        corpus: the text.
        parameters: that were trained.
    """
    table = "\n".join(f"| {name} | `{value}` |" for name, value in settings.items())
    return f"""# A draft for {target}

Made by mcsd {mcsd.__version__} (torch {torch.__version__}, transformers {transformers.__version__}) with

    {command}

Use it with `mcsd generate --target {target} --draft FOLDER`. It changes the speed of {target}, never
its law.

## Acceptance on held-out text

{acceptance_table(report.acceptance)}

At temperature 1 the chance that one candidate is accepted; at temperature 0 the share of tokens that are the draft's
first, or among its first four. Step n reads what the draft itself gave at step n - 1, along the target's text.

## Made of

{parameters / 1e6:.2f} million trained parameters, {report.step} steps in {report.seconds / 60:.1f} minutes.
{len(corpus.lengths)} texts with {corpus.tokens} tokens that {target} wrote or read, one in twenty held out
(at most 64).

| setting | value |
|---|---|
{table}
"""


def acceptance_table(acceptance: Acceptance) -> str:
    """Markdown: a line for each step ahead."""
    rows = zip(acceptance.sampled, acceptance.greedy, acceptance.greedy4, strict=True)
    lines = [
        f"| {step} | {sampled:.3f} | {first:.3f} | {four:.3f} |" for step, (sampled, first, four) in enumerate(rows, 1)
    ]
    head = "| step | temperature 1 | temperature 0, first | temperature 0, first four |\n|---|---|---|---|"
    return "\n".join([head, *lines])
