"""Check and time mcsd on a CUDA card: is it right there, how fast is it, and where does a step spend its time.

    make gpu                                    within eight minutes; SECONDS=180 leaves out what it can
    make gpu ARGS="--target 13b --draft 160m --only machine pair timing"
    make gpu PYTHON=.venv/bin/python ARGS="--device cpu --tiny"       the rehearsal, without a card

Needs torch, transformers and this checkout, and downloads nothing. A section that fails is named, and the others run.
The exit code is 1 if a check was wrong or a section failed.
"""

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import transformers

from gpu.correctness import check_parity, check_refusals, check_trees, count_seeds
from gpu.distribution import check_distributions
from gpu.machine import measure_machine
from gpu.session import Session
from gpu.synthetic_pair import DRAFTS, TARGETS
from gpu.tables import render
from gpu.timing import measure_pair, time_alone, time_batch, time_static


class Section(NamedTuple):
    """A part of a run.

    Attributes:
        run: does it.
        seconds: that must be left on a card for it to start.
        is_short: whether a short run has it.
    """

    run: Callable[[Session], None]
    seconds: int
    is_short: bool = False


SECTIONS = {
    "machine": Section(measure_machine, 10, is_short=True),
    "parity": Section(check_parity, 20, is_short=True),
    "tree": Section(check_trees, 10),
    "distribution": Section(check_distributions, 20, is_short=True),
    "refusals": Section(check_refusals, 10),
    "pair": Section(measure_pair, 40, is_short=True),
    "batch": Section(count_seeds, 60),
    "timing": Section(time_alone, 40, is_short=True),
    "static": Section(time_static, 120),
    "timing-batch": Section(time_batch, 30),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short texts: a rehearsal")
    parser.add_argument("--seconds", type=float, default=480, help="time limit; below 300 a short run")
    parser.add_argument("--out", default="bench-results", help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="run these sections")
    parser.add_argument("--target", choices=TARGETS, default="7b")
    parser.add_argument("--draft", choices=DRAFTS, default="68m")
    parser.add_argument(
        "--eps", type=float, default=0.1, help="how far the draft is from the target; .1: acceptance .7"
    )
    parser.add_argument("--new", type=int, default=128, help="new tokens of a timed text")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA card here; rehearse with --device cpu --tiny")
    if options.tiny:
        options.target, options.draft, options.new = "tiny", "tiny-draft", min(options.new, 16)
    if "tiny" in options.target + options.draft and not options.tiny:
        parser.error("the tiny shapes go with --tiny")
    transformers.logging.set_verbosity_error()
    session = Session(options)
    for name, section in SECTIONS.items():
        if name in options.only if options.only else section.is_short or not session.is_short:
            _run(session, name, section)
    session.section = "summary"
    wrong = [name for name, is_right in session.results["checks"].items() if not is_right]
    session.say(f"wrong checks: {', '.join(wrong) or 'none'}")
    session.say(f"failed: {', '.join(session.results['failed']) or 'none'}")
    session.say(f"{options.seconds - session.seconds_left:.0f} s; results in {options.out}")
    return int(session.has_failed)


def _run(session: Session, name: str, section: Section) -> None:
    session.section = name
    if session.is_cuda and session.seconds_left < section.seconds:
        session.results["skipped"][name] = "no time left"
        session.say("skipped: no time left")
    else:
        session.say(f"starts with {session.seconds_left:.0f} s left")
        try:
            with warnings.catch_warnings():
                # Of torch and transformers, about kernels and dtypes.
                warnings.simplefilter("ignore", UserWarning)
                section.run(session)
        except Exception as error:
            session.results["failed"][name] = f"{type(error).__name__}: {error}"
            session.say(f"FAILED: {type(error).__name__}: {error}")
            traceback.print_exc(limit=8, file=sys.stdout)
    session.save(render(session.results))


if __name__ == "__main__":
    sys.exit(main())
