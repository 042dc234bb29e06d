"""``mcsd generate``: answer a prompt, or continue a text."""

import sys
from dataclasses import asdict, replace
from typing import Annotated

import typer

from mcsd.cli.options import Color, Json, SamplingArguments, System, command, load_engine
from mcsd.cli.output import completion_json, print_color_legend, print_json, print_prompt, summary, write_stream
from mcsd.cli.profile import StepProfiler, profile_table
from mcsd.config import EngineOptions
from mcsd.errors import EmptyPrompt, InvalidOption, InvalidParameter

Prompt = Annotated[
    str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default="stdin, if piped")
]

Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is, without the chat template of an instruct model.")
]
Profile = Annotated[bool, typer.Option("--profile", help="Print tree, scheme and the time of each part of a step.")]


@command
def generate(
    prompt: Prompt = None,
    *,
    engine: EngineOptions,
    sampling: SamplingArguments,
    raw: Raw = False,
    system: System = None,
    color: Color = False,
    profile: Profile = False,
    json: Json = False,
) -> None:
    """Answer a prompt, or continue a text if the model has no chat template. Text goes to stdout, a summary to stderr.

    Examples:

    mcsd generate "Tell me the capital of France."

    mcsd generate --raw "Once upon a time" -n 64 --temperature 0 --color

    mcsd generate - --json < prompt.txt
    """
    fields = sampling.given()
    if raw and system is not None:
        raise InvalidOption("--raw leaves no place for --system", "leave one of them out")
    text = _read(prompt)
    loaded = load_engine(replace(engine, max_batch=1))
    profiler = StepProfiler(loaded) if profile else None
    chat = system is not None or (loaded.encoder.has_chat_template and not raw)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        stream = loaded.stream_chat([*messages, {"role": "user", "content": text}], **fields)
    else:
        stream = loaded.stream(text, **fields)
    if not json:
        print_prompt(text, "\n" if chat else "")
        if color:
            print_color_legend()
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
        # In some locales Python reads wrong bytes as lone surrogates.
        (prompt or "").encode()
    except UnicodeError as error:
        raise InvalidParameter("the prompt is not UTF-8 text", "convert it, for example with iconv") from error
    if not prompt:
        raise EmptyPrompt("the prompt is empty", "give a text, or pipe one in")
    return prompt
