"""``mcsd generate``: continue a text."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mcsd.cli.options import Color, EngineOptions, Json, SamplingOptions, command
from mcsd.cli.output import as_object, legend, print_json, show, summary
from mcsd.cli.profile import Profiler, table
from mcsd.errors import EmptyPrompt, InvalidParameter

Prompt = Annotated[
    str | None, typer.Argument(help="The text to continue; - reads it from stdin.", show_default="stdin, if piped")
]

Profile = Annotated[bool, typer.Option("--profile", help="Say where the time of a step goes.")]


@command
def generate(
    prompt: Prompt = None,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    color: Color = False,
    profile: Profile = False,
    json: Json = False,
) -> None:
    """Continue a text. It goes to stdout as it comes, a summary to stderr."""
    params = sampling.params()
    text = _read(prompt)
    loaded = engine.load()
    clock = Profiler(loaded) if profile else None
    if color and not json:
        legend()
    stream = loaded.stream(text, params)
    chunks = list(stream if json else show(stream, color))
    done = chunks[-1].completion
    assert done is not None
    found = clock.profile(chunks) if clock else None
    if json:
        print_json(as_object(loaded, done) | ({"profile": asdict(found)} if found else {}))
        return
    print(summary(loaded, done), file=sys.stderr)
    if found:
        print("\n".join(table(found)), file=sys.stderr)


def _read(prompt: str | None) -> str:
    """The prompt as text; from stdin without the newline that ends its last line."""
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
