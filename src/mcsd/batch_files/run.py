"""The run of a batch: check the input, go on after the answers that there are, write the others as they come."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain

from mcsd.batch_files.answers import Answer, answers
from mcsd.batch_files.lines import Line, check_lines, read_lines
from mcsd.batch_files.options import BatchOptions
from mcsd.batch_files.output import open_output
from mcsd.engine import Engine
from mcsd.errors import InvalidOption


@dataclass
class BatchProgress:
    """How far a batch is.

    Attributes:
        lines: requests of the input.
        resumed: answers that an earlier run has written.
        answered: all answers that are written.
        failed: answers of this run that are errors.
        tokens: generated in this run.
        seconds: since its first request was begun.
    """

    lines: int
    resumed: int
    answered: int
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of this run."""
        return self.tokens / self.seconds if self.seconds else 0.0


AnswerSource = Callable[[Iterator[Line]], Generator[Answer, None, None]]
"""Answers requests, in their order. It is not called if there are none."""


def run_batch(
    options: BatchOptions,
    load: Callable[[], Engine] | None = None,
    report: Callable[[BatchProgress], None] = lambda progress: None,
    source: AnswerSource | None = None,
) -> BatchProgress:
    """Answer the requests of a file, each once and in order, in the batch format of OpenAI.

    A run that was interrupted or killed goes on after the last whole answer when it is started again with the same
    input and options. An error of one request is its answer, and the others go on.

    Args:
        options: what is answered, and how.
        load: loads the engine, if there is something left to do; None: by the options.
        report: called after every answer.
        source: answers the requests instead of an engine of this process.

    Raises:
        DataError: the input has a line that is no request, or the output has answers of other requests or options.
        InvalidOption: another process writes the output, or it is the input.
        OutputFailed: the output cannot be written.
        McsdError: the engine cannot be loaded, or cannot go on.
    """
    if options.output.resolve() == options.input.resolve():
        raise InvalidOption(f"{options.output} is the input, too", "choose another output")
    key = options.key
    count = check_lines(options.input, key)
    with open_output(options.output, read_lines(options.input, key)) as output:
        progress = BatchProgress(count, output.answered, output.answered)
        first = next(output.unanswered, None)
        if first is None:
            return progress
        if source is None:
            engine = load() if load else Engine.from_options(options.engine)
            source = partial(answers, engine, served_name=options.served_name)
        began = time.monotonic()
        with closing(source(chain([first], output.unanswered))) as found:
            for answer in found:
                output.append(answer.text)
                progress.answered += 1
                progress.failed += answer.failed
                progress.tokens += answer.tokens
                progress.seconds = time.monotonic() - began
                report(progress)
        return progress
