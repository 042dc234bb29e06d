"""``mcsd distill``: train a draft for a target."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsd.cli.options import Json, command
from mcsd.cli.output import ProgressDisplay, fetch_missing, print_json, spinner
from mcsd.config import LoadOptions, same_option
from mcsd.distill import DistillOptions

if TYPE_CHECKING:
    from mcsd.distill.trainer import TrainingReport

_draft = functools.partial(typer.Option, rich_help_panel="Draft")
_text = functools.partial(typer.Option, rich_help_panel="Text")

Out = Annotated[Path, typer.Option("--out", help="Output folder; run the command again to resume.")]
Kind = Annotated[
    str,
    _draft(
        "--kind",
        help="head or eagle3: reads the target's hidden states; other programs load eagle3. model: a small model.",
    ),
]
Layers = Annotated[
    int | None, _draft("--layers", help="Layers of the draft.", show_default="1, all of --init, or an eighth")
]
Init = Annotated[str | None, _draft("--init", help="Head, or with --kind model the model, to start from.")]
Vocab = Annotated[
    int | None, _draft("--vocab", help="Size of the draft vocabulary.", show_default="8192 for a head, all for a model")
]
TttSteps = Annotated[
    int | None,
    _draft("--ttt-steps", help="Training-time test: levels of the tree that a head is trained on.", show_default="2"),
]
Loss = Annotated[str, _draft("--loss", help="Training loss: kl, reverse-kl or tv.")]
Minutes = Annotated[
    float, typer.Option("--minutes", help="Time limit for text and training; at most 40 % goes into text.")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Training steps, instead of --minutes.")]
Tokens = Annotated[int, _text("--tokens", help="Maximum number of tokens of training text.")]
Prompts = Annotated[
    Path | None, _text("--prompts", help="Train on answers to these prompts: a text file with one per line, or JSONL.")
]
Data = Annotated[
    Path | None, _text("--data", help="Train on this text file, or on the text of an earlier --out folder.")
]
HiddenStates = Annotated[
    str, _text("--hidden-states", help="Of the target: stored with the text, or computed in every training step.")
]
Batch = Annotated[int, _text("--batch", help="Batch size of text generation.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed; with --steps, the same seed gives the same draft.")]


@dataclass(frozen=True)
class DistillArguments:
    """The arguments of `mcsd.distill.DistillOptions`."""

    out: Out
    target: str = same_option(LoadOptions, "target")
    kind: Kind = "head"
    layers: Layers = None
    init: Init = None
    vocab: Vocab = None
    ttt_steps: TttSteps = None
    minutes: Minutes = 60.0
    steps: Steps = None
    tokens: Tokens = 1_000_000
    prompts: Prompts = None
    data: Data = None
    hidden_states: HiddenStates = "stored"
    loss: Loss = "kl"
    batch: Batch = 96
    seed: Seed = 0
    device: str = same_option(LoadOptions, "device")


@command
def distill(*, options: DistillArguments, json: Json = False) -> None:
    """Train a draft for a target on text that the target generates."""
    config = DistillOptions(**vars(options))
    fetch_missing(options.target, options.init)
    with spinner("starting"):
        from mcsd.distill import Callbacks, distill
    display = ProgressDisplay()

    def trained(report: "TrainingReport") -> None:
        display.update(f"training: {report.share:.0%}")
        display.log(_line(report))

    with display.running():
        report = distill(config, Callbacks(lambda tokens: display.update(f"writing: {tokens} tokens"), trained))
    if json:
        print_json({"draft": str(options.out), **asdict(report)})
    else:
        print(options.out)


def _line(report: "TrainingReport") -> str:
    steps = " ".join(f"{value:.3f}" for value in report.acceptance.sampled)
    greedy = " ".join(f"{value:.3f}" for value in report.acceptance.greedy)
    loss = "" if report.loss is None else f"  loss {report.loss:.3f}"
    return (
        f"{report.share:4.0%}  step {report.step}  {report.seconds / 60:.1f} min{loss}  "
        f"acceptance at T=1 {steps}, at T=0 {greedy}"
    )
