"""``mcsd distill``: make a draft for a target."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsd.cli.options import Device, Json, Target, command
from mcsd.cli.output import Gauge, fetch_missing, print_json, working

if TYPE_CHECKING:
    from mcsd.distill.trainer import Report

_draft = functools.partial(typer.Option, rich_help_panel="Draft")
_text = functools.partial(typer.Option, rich_help_panel="Text")

Out = Annotated[Path, typer.Option("--out", help="The folder to put it in; run again to go on after a break.")]
Kind = Annotated[str, _draft("--kind", help="head: on the target's states. model: a small model.")]
Layers = Annotated[int | None, _draft("--layers", help="Of the draft.", show_default="1, all of --init, or an eighth")]
Init = Annotated[str | None, _draft("--init", help="A model to begin with, for --kind model.")]
Vocab = Annotated[
    int | None, _draft("--vocab", help="Tokens that it can propose.", show_default="8192 for a head, all for a model")
]
Loss = Annotated[str, _draft("--loss", help="kl, reverse-kl or tv.")]
Minutes = Annotated[float, typer.Option("--minutes", help="For text and training; at most two fifths go into text.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Of training, in place of --minutes.")]
Tokens = Annotated[int, _text("--tokens", help="Of text, at most.")]
Prompts = Annotated[Path | None, _text("--prompts", help="Answer these: a prompt a line, or JSONL.")]
Data = Annotated[Path | None, _text("--data", help="Read this text file, or take the text of an earlier --out.")]
Batch = Annotated[int, _text("--batch", help="Texts that are written together.")]
Seed = Annotated[int, typer.Option("--seed", help="With --steps, the same seed gives the same draft.")]


@dataclass(frozen=True)
class DistillOptions:
    """The arguments of `mcsd.distill.Options`."""

    out: Out
    target: Target = "smollm2-135m"
    kind: Kind = "head"
    layers: Layers = None
    init: Init = None
    vocab: Vocab = None
    minutes: Minutes = 60.0
    steps: Steps = None
    tokens: Tokens = 1_000_000
    prompts: Prompts = None
    data: Data = None
    loss: Loss = "kl"
    batch: Batch = 96
    seed: Seed = 0
    device: Device = "auto"


@command
def distill(*, options: DistillOptions, json: Json = False) -> None:
    """Make a draft for a target, from text that the target writes."""
    with working("starting"):
        from mcsd.distill import Events, Options, distill

    wanted = Options(**vars(options))
    fetch_missing(options.target, options.init)
    gauge = Gauge()

    def trained(report: "Report") -> None:
        gauge.show(f"training: {report.share:.0%}")
        gauge.say(_line(report))

    with gauge.running():
        report = distill(wanted, Events(lambda tokens: gauge.show(f"writing: {tokens} tokens"), trained))
    if json:
        print_json({"draft": str(options.out), **asdict(report)})
    else:
        print(options.out)


def _line(report: "Report") -> str:
    steps = " ".join(f"{value:.3f}" for value in report.acceptance.sampled)
    greedy = " ".join(f"{value:.3f}" for value in report.acceptance.greedy)
    loss = "" if report.loss is None else f"  loss {report.loss:.3f}"
    return (
        f"{report.share:4.0%}  step {report.step}  {report.seconds / 60:.1f} min{loss}  "
        f"acceptance at T=1 {steps}, at T=0 {greedy}"
    )
