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

ShowTree = Annotated[
    bool,
    typer.Option("--show-tree", help="Print the candidate tree of each step before the text; with --json, as data."),
]


@command
def generate(
    prompt: Prompt = None,
    *,
    engine: EngineOptions,
    sampling: SamplingArguments,
    raw: Raw = False,
    system: System = None,
    color: Color = None,
    profile: Profile = False,
    show_tree: ShowTree = False,
    json: Json = False,
) -> None:
    """Answer a prompt, or continue a text if the model has no chat template. Text goes to stdout, a summary to stderr.

    Examples:

    mcsd generate "Tell me the capital of France."

    mcsd generate --raw "Once upon a time" -n 64 --temperature 0 --color

    mcsd generate "Why is the sky blue?" --show-tree -n 16

    mcsd generate - --json < prompt.txt
    """
    fields = sampling.given()
    if raw and system is not None:
        raise InvalidOption("--raw leaves no place for --system", "leave one of them out")
    if profile and show_tree:
        raise InvalidOption("--show-tree slows down the steps that --profile measures", "leave one of them out")
    text = _read(prompt)
    loaded = load_engine(replace(engine, max_batch=1))
    profiler = StepProfiler(loaded) if profile else None
    chat = system is not None or (loaded.encoder.has_chat_template and not raw)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        stream = loaded.stream_chat([*messages, {"role": "user", "content": text}], trace=show_tree, **fields)
    else:
        stream = loaded.stream(text, trace=show_tree, **fields)
    if show_tree and not json:
        # Imported when it is used: rich's parts take time to import.
        from mcsd.cli.tree_view import show_steps

        stream = iter(list(show_steps(stream, color)))
    if not json:
        print_prompt(text, "\n" if chat else "")
        if color:
            print_color_legend()
    chunks = list(stream if json else write_stream(stream, bool(color)))
    done = chunks[-1].completion
    assert done is not None
    measured = profiler.profile(chunks) if profiler else None
    if json:
        steps = {"steps": [asdict(chunk.trace) for chunk in chunks if chunk.trace]} if show_tree else {}
        print_json(completion_json(loaded, done) | ({"profile": asdict(measured)} if measured else {}) | steps)
        return
    print(summary(loaded, done), file=sys.stderr)
    if show_tree:
        print("the steps were slower than without --show-tree", file=sys.stderr)
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
