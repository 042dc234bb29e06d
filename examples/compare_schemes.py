"""Compare verification schemes and trees by acceptance: how many tokens a forward of the target gives.

python examples/compare_schemes.py  # SmolLM2-135M-Instruct with its draft head, six questions

All of these have the same output distribution: the target's. No time is measured, because acceptance does not depend on
the machine (but for rounding). `mcsd tune` and `mcsd bench` measure which tree is the fastest.
"""

import argparse
from math import sqrt
from statistics import mean, stdev

import mcsd

QUESTIONS = (
    "Why is the sky blue?",
    "Give three tips for staying awake during a long lecture.",
    "Write a short letter that invites a friend to a picnic.",
    "Describe how bread is baked, step by step.",
    "What are the main differences between a lake and a river?",
    "Write a Python function that counts the vowels of a string.",
)
CONFIGURATIONS = (  # trees, and schemes that verify them
    ("chain:2", ("mcss-wor", "block")),
    ("2x1", ("mcss-wor", "mcss", "greedy-draft", "traversal", "top-k", "naive")),
    ("4x2x1", ("mcss-wor", "naive")),
)

parser = argparse.ArgumentParser()
parser.add_argument("--target", default="smollm2-135m")
parser.add_argument("--draft", default=None, help="default: that of the target")
parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text")
args = parser.parse_args()

conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
params = mcsd.SamplingParams(temperature=1, max_new_tokens=args.tokens, seed=0, ignore_eos=True)

print("tree      candidates  scheme        tokens a forward  candidates accepted")
for tree, schemes in CONFIGURATIONS:
    for scheme in schemes:
        engine = mcsd.Engine.load(args.target, args.draft, tree=tree, scheme=scheme)
        stats = [done.stats for done in engine.chat(conversations, params)]
        lengths = [each.mean_acceptance_length for each in stats]
        error = stdev(lengths) / sqrt(len(lengths))
        rate = sum(each.accepted_tokens for each in stats) / sum(each.draft_tokens for each in stats)
        size, length = len(mcsd.TreeShape.parse(tree)), f"{mean(lengths):.2f} ± {error:.2f}"
        print(f"{tree:9} {size:10}  {scheme:12}  {length:>16}  {rate:19.0%}")
print(f"± is the standard error over {len(conversations)} texts: rows that differ by less than twice that are alike.")
print(
    "Wider trees get more tokens a forward and waste more candidates, each of which costs time, most of all on a CPU."
)
