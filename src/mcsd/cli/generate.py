"""``mcsd generate``: continue a text."""

import sys
from dataclasses import asdict, replace
from typing import Annotated

import typer

from mcsd.cli.options import Color, Json, SamplingArguments, command, load_engine
from mcsd.cli.output import completion_json, print_color_legend, print_json, summary, write_stream
from mcsd.cli.profile import StepProfiler, profile_table
from mcsd.config import EngineOptions
from mcsd.errors import EmptyPrompt, InvalidParameter

Prompt = Annotated[
    str | None, typer.Argument(help="Text to continue; - reads it from stdin.", show_default="stdin, if piped")
]

Profile = Annotated[bool, typer.Option("--profile", help="Print the time of each part of a step.")]


@command
def generate(
    prompt: Prompt = None,
    *,
    engine: EngineOptions,
    sampling: SamplingArguments,
    color: Color = False,
    profile: Profile = False,
    json: Json = False,
) -> None:
    """Continue a text. The text streams to stdout, a summary goes to stderr."""
    params = sampling.params()
    text = _read(prompt)
    loaded = load_engine(replace(engine, max_batch=1))
    profiler = StepProfiler(loaded) if profile else None
    if color and not json:
        print_color_legend()
    stream = loaded.stream(text, params)
    chunks = list(stream if json else write_stream(stream, color))
    done = chunks[-1].completion
    assert done is not None
    measured = profiler.profile(chunks) if profiler else None
    if json:
        print_json(completion_json(loaded, done) | ({"profile": asdict(measured)} if measured else {}))
        return
    print(summary(loaded, done), file=sys.stderr)
    if measured:
        print("\n".join(profile_table(measured)), file=sys.stderr)


def _read(prompt: str | None) -> str:
    """The prompt as text; from stdin without the trailing newline."""
    try:
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.read().removesuffix("\n")
        elif prompt is not None:
            prompt.encode()
    except UnicodeError as error:
        raise InvalidParameter("the prompt is not UTF-8 text", "convert it, for example with iconv") from error
    if not prompt:
        raise EmptyPrompt("the prompt is empty", "give a text, or pipe one in")
    return prompt
