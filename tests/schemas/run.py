"""``make schemas``: answers under the schemas of the JSON Schema Test Suite, validated by the package jsonschema.

An answer that ends in "stop" must validate; one that is cut must say "length"; a schema that llguidance does not
compile must be refused by name. The exit code is 1 if anything else happens. The suite is part of the source package
of jsonschema, which is downloaded unless ``--suite`` names it, or the folder of the suite.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
from tqdm import tqdm

import mcsd
from mcsd.errors import InvalidGrammar, RequestError

DRAFTS = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
}
PROMPT = "A short JSON value: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, help="source package of jsonschema, or the folder of the suite")
    parser.add_argument("--count", type=int, default=500, help="schemas")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tree", default="2x1")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        cases = list(schemas(suite(args.suite, Path(home))))[: args.count]
    engine = mcsd.Engine.load(args.model, tree=args.tree, max_batch=8)
    outcomes, wrong, waiting = Counter[str](), list[str](), list[tuple[str, Any, Any]]()
    for case in tqdm(cases):
        try:
            engine.request(PROMPT, max_new_tokens=1, json_schema=case[1])
            waiting.append(case)
        except InvalidGrammar:
            outcomes["refused by name"] += 1
        except Exception as error:
            wrong.append(f"{case[0]}: {error!r}")
        if len(waiting) == 8 or case is cases[-1]:
            for outcome, problem in answers(engine, waiting, args.max_new_tokens):
                outcomes[outcome] += 1
                wrong += [problem] if problem else []
            waiting.clear()
    print("\n".join(wrong))
    print(f"{len(cases)} schemas: {dict(outcomes)}; {len(wrong)} wrong")
    sys.exit(bool(wrong))


def suite(given: Path | None, folder: Path) -> Path:
    """The folder with the suite's drafts."""
    if given is not None and given.is_dir():
        return given
    if given is None:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", str(folder), "jsonschema"], check=True)
        given = next(folder.glob("jsonschema-*.tar.gz"))
    with tarfile.open(given) as package:
        package.extractall(folder, filter="data")
    return next(folder.glob("*/json/tests"))


def schemas(folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """Name, schema and validator of the objects among the suite's schemas, each schema once."""
    seen = set()
    for draft, validator in DRAFTS.items():
        for file in sorted((folder / draft).rglob("*.json")):
            for group in json.loads(file.read_text()):
                schema = group["schema"]
                text = json.dumps(schema)
                if isinstance(schema, dict) and text not in seen:
                    seen.add(text)
                    yield f"{draft}/{file.stem}: {group['description']}", schema, validator


def answers(engine: mcsd.Engine, cases: list[tuple[str, Any, Any]], length: int) -> Iterator[tuple[str, str]]:
    """For each case what came of it, and what is wrong about it."""
    params = [
        mcsd.SamplingParams(json_schema=schema, temperature=1.0, max_new_tokens=length, seed=seed)
        for seed, (_, schema, _) in enumerate(cases)
    ]
    try:
        done: Any = engine.generate([PROMPT] * len(cases), params)
    except RequestError as error:
        done = [one or error for one in error.completions]
    for (name, schema, validator), one in zip(cases, done, strict=True):
        if isinstance(one, Exception):
            yield "failed", f"{name}: {one!r}"
        elif one.finish_reason == "length":
            yield "length", "" if len(one.token_ids) == length else f"{name}: cut after {len(one.token_ids)} tokens"
        else:
            try:
                error = jsonschema.exceptions.best_match(validator(schema).iter_errors(json.loads(one.text)))
                error = None if error is not None and is_rounding(error) else error
            except Exception as raised:
                error = raised
            yield "stop, valid" if error is None else "stop, invalid", error and f"{name}: {one.text!r}: {error!r:.200}"


def is_rounding(error: jsonschema.ValidationError) -> bool:
    """Whether a number is a multiple after all: jsonschema divides floats."""
    return error.validator == "multipleOf" and not Decimal(str(error.instance)) % Decimal(str(error.validator_value))


if __name__ == "__main__":
    main()
