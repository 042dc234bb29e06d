"""Train a draft head for a model, and compare its acceptance with other drafts.

python examples/train_draft.py  # SmolLM2-135M-Instruct; about a minute, then about ten seconds to compare
python examples/train_draft.py --target MODEL --steps 900 --tokens 1000000  # a real run takes an hour or more
"""

import argparse
import subprocess
import sys
from pathlib import Path

import mcsd

QUESTIONS = ("Why is the sky blue?", "What is a lake?", "How is bread baked?", "Write a letter that invites a friend.")

parser = argparse.ArgumentParser()
parser.add_argument("--target", default="smollm2-135m")
parser.add_argument("--out", type=Path, default=Path("my-head"), help="a run that was interrupted goes on from here")
parser.add_argument("--tokens", type=int, default=4000, help="of training text, which the target writes itself")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

command = f"distill --target {args.target} --tokens {args.tokens} --steps {args.steps} --batch 16 --out".split()
print("mcsd", *command, args.out, flush=True)
subprocess.run([sys.executable, "-m", "mcsd", *command, str(args.out)], check=True)

drafts = {"n-grams": "ngram", "your head": str(args.out), "default draft": None}
conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
texts = []
print("draft          tokens a forward of the target, tree 2x1, temperature 0")
for name, draft in drafts.items():
    engine = mcsd.Engine.load(args.target, draft, tree="2x1", dtype="float32")
    answers = engine.chat(conversations, temperature=0, max_new_tokens=64)
    texts.append([done.token_ids for done in answers])
    forwards = sum(done.stats.target_calls for done in answers)
    print(f"{name:14} {sum(done.stats.new_tokens for done in answers) / forwards:.2f}")
print("The texts are", "the same:" if texts[0] == texts[1] == texts[2] else "NOT the same:", end=" ")
print("a draft changes the speed of its target, and not its output.")
print("1.00 is plain decoding. A head that trained for a minute predicts little; acceptance rises with text and steps.")
