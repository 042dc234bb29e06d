"""The cost of a grammar: seconds of a step with a JSON schema over those of one without, interleaved.

Both kinds of requests run one at a time on one engine with a fixed tree, and so take the same forwards per step. The
time of a step is that of drafting, scoring, verification and the rest, without the prompt.

    python benchmarks/structured.py --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b --tree 2x1
"""

import argparse
from statistics import median

import mcsd

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 8},
        "summary": {"type": "string", "minLength": 400},
    },
    "required": ["title", "year", "tags", "summary"],
    "additionalProperties": False,
}
PROMPT = "Describe a book in JSON with its title, year, tags and a long summary."


def main() -> None:
    """Print a line for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft")
    parser.add_argument("--tree", default="2x1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    engine = mcsd.Engine.load(args.target, args.draft, tree=args.tree, max_batch=1)
    for temperature in (0.0, 1.0):
        free: list[float] = []
        constrained: list[float] = []
        for seed in range(args.rounds + 1):
            common = {"temperature": temperature, "seed": seed, "max_new_tokens": args.max_new_tokens}
            for times, fields in ((free, {"ignore_eos": True}), (constrained, {"json_schema": SCHEMA})):
                stats = engine.chat([{"role": "user", "content": PROMPT}], **common, **fields).stats
                seconds = sum(stats.seconds.values()) - stats.seconds["prefill"]
                times.append(seconds / stats.target_calls)
        # The first round prepares the tokenizer and fills caches.
        ratios = [with_it / without for with_it, without in zip(constrained[1:], free[1:], strict=True)]
        print(
            f"temperature {temperature:g}: {1e3 * median(free[1:]):.1f} ms a step without a grammar,"
            f" {1e3 * median(constrained[1:]):.1f} with; median ratio of pairs {median(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
