"""``make mutants``: plant every fault of `faults`, one at a time, and run the laws on it with two seeds.

Each fault is planted in a copy of the source. The laws run on the copy, up to the first that fails. The table goes into
``docs/mutants.md``, where ``--only`` changes the rows of the faults that it runs; the exit code is 1 if any fault
survives any seed. ``--plant NAME`` only makes the copy with that fault, for inspection.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from mcsd import kernels
from mutants.faults import FAULTS, KERNELS, Fault

ROOT = Path(__file__).parents[2]
LAWS = (
    *("test_greedy", "test_published_heads_law", "test_exact_law", "test_translated_draft_law", "test_exact_engine"),
    "test_engine_law",
    *("test_draft_vocabulary_law", "test_mixed_law", "test_plain_sequences_law", "test_grammar_law", "test_gguf_law"),
)
"""From the fastest to the slowest; of faults in our kernels the last one comes first."""

SEEDS = (1, 2)
_FAILED = re.compile(r"^FAILED tests/laws/(.+?)(?: - (.*))?$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plant", help="name of a fault: make the copy, print its path, run nothing")
    parser.add_argument("--only", help="only faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="faults that run in parallel")
    args = parser.parse_args()
    if args.plant:
        fault = next(fault for fault in FAULTS if fault.name == args.plant)
        print(planted(fault, Path(tempfile.mkdtemp(prefix="fault-"))))
        return
    # Faults in our kernels can be caught only where the kernels run.
    runnable = [fault for fault in FAULTS if not fault.file.startswith(KERNELS) or kernels.has_kernels()]
    faults = [fault for fault in runnable if not args.only or args.only in fault.name]
    runs = [(fault, seed) for fault in faults for seed in SEEDS]
    with ThreadPoolExecutor(args.jobs) as pool, tempfile.TemporaryDirectory() as home:
        # A law that fails without a fault would catch everything.
        if any(pool.map(lambda seed: caught(None, seed, home), SEEDS)):
            sys.exit("the laws fail without a fault; run make test")
        found = []
        results = tqdm(pool.map(lambda one: caught(*one, home), runs), total=len(runs))
        for (fault, seed), law in zip(runs, results, strict=True):
            tqdm.write(f"{fault.name}, seed {seed}: {law or 'not caught'}")
            found.append(law)
    seeds = len(SEEDS)
    table = [(fault, found[seeds * i : seeds * (i + 1)]) for i, fault in enumerate(faults)]
    path = ROOT / "docs" / "mutants.md"
    path.write_text(page(table, path.read_text()))
    survivors = [fault.name for fault, laws in table if not all(laws)]
    print(f"{len(faults)} faults, {len(survivors)} not caught{': ' if survivors else ''}{'; '.join(survivors)}")
    sys.exit(bool(survivors))


def planted(fault: Fault | None, folder: Path) -> Path:
    """A copy of the source, with the fault if one is given."""
    copy = folder / "src"
    shutil.copytree(ROOT / "src" / "mcsd", copy / "mcsd", ignore=shutil.ignore_patterns("__pycache__"))
    if fault is None:
        return copy
    path = copy / "mcsd" / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}, not once")
    path.write_text(text.replace(fault.old, fault.new))
    return copy


def caught(fault: Fault | None, seed: int, home: str) -> str | None:
    """The first law that fails, and how; None if all pass. Compiled kernels are kept in ``home``, by their source."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(planted(fault, Path(folder))),
            "MCSD_HOME": home,
            "MCSD_LAW_SEED": str(seed),
            "MCSD_LAW_INSTANCES": "4",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",  # pytest truncates failure messages to this width.
        }
        in_kernels = fault is not None and fault.file.startswith(KERNELS)
        laws = [f"tests/laws/{law}.py" for law in (LAWS[::-1] if in_kernels else LAWS)]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *laws]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failure = _FAILED.search(done.stdout)
    if failure is None:
        raise SystemExit(f"{fault and fault.name}: the laws did not run\n{done.stdout[-2000:]}")
    message = failure[2] or "assert"
    return f"`{failure[1]}`" + ("" if "assert" in message.lower() else f" ({message.split(':')[0]:.30})")


def page(table: list[tuple[Fault, list[str | None]]], before: str) -> str:
    """The table as a page of the docs, with the rows of other faults from the page ``before``."""
    old = {line.split(" | ")[0]: line for line in before.splitlines()}
    new = {
        f"| {fault.name}": f"| {fault.name} | `{fault.file}` | {' | '.join(law or '**not caught**' for law in laws)} |"
        for fault, laws in table
    }
    rows = [row for fault in FAULTS if (row := (old | new).get(f"| {fault.name}"))]
    return "\n".join(
        [
            "# Planted faults",
            "",
            "Every fault below was planted in the source, one at a time, and the laws of `tests/laws` were run up to",
            "the first that fails, with two seeds. An exception in brackets means that the code raised it in that law",
            "before its numbers were compared. Generated by `make mutants`.",
            "",
            f"| fault | in | {' | '.join(f'caught by, seed {seed}' for seed in SEEDS)} |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
