"""``mcsd batch``: answer a file of requests."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsd.batch_files import BatchOptions
from mcsd.cli.options import Json, command, load_engine
from mcsd.cli.output import ProgressDisplay, print_json
from mcsd.cli.serve import ServeEngineOptions
from mcsd.errors import MissingPackage

if TYPE_CHECKING:
    from mcsd.batch_files.run import BatchProgress
    from mcsd.engine import Engine

Input = Annotated[Path, typer.Argument(help="Requests in the batch format of OpenAI, a JSON object a line.")]
Output = Annotated[Path, typer.Argument(help="Where answers are written; run the command again to resume.")]
ServedName = Annotated[
    str | None,
    typer.Option("--served-name", help="Name of the model in requests and answers.", show_default="that of the target"),
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed of requests that name none.")]

_LOG_SECONDS = 60.0


@command
def batch(
    input: Input,
    output: Output,
    *,
    engine: ServeEngineOptions,
    served_name: ServedName = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Answer a file of requests, in order. A run that was interrupted goes on when the command is run again.

    Example:

    mcsd batch requests.jsonl answers.jsonl -m smollm2-135m --max-batch 16
    """
    options = BatchOptions(input, output, engine, served_name, seed)
    try:
        from mcsd.batch_files.run import run_batch
    except ModuleNotFoundError as error:
        raise MissingPackage(f"batches need {error.name}", 'pip install "mcsd[server]"') from error
    display = ProgressDisplay()
    logged = time.monotonic()

    def report(progress: "BatchProgress") -> None:
        nonlocal logged
        display.update(_line(progress))
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            display.log(_line(progress))

    with ExitStack() as stack:

        def load() -> "Engine":
            loaded = load_engine(engine)
            stack.enter_context(display.running())
            return loaded

        progress = run_batch(options, load, report)
    if json:
        print_json({"output": str(output), **asdict(progress), "tokens_per_second": progress.tokens_per_second})
    else:
        display.log(_line(progress))


def _line(progress: "BatchProgress") -> str:
    parts = [f"{progress.answered} of {progress.lines} answers", f"{progress.tokens_per_second:.1f} tokens/s"]
    parts += [f"{progress.failed} errors"] if progress.failed else []
    parts += [f"{progress.resumed} of an earlier run"] if progress.resumed else []
    return " · ".join(parts)
