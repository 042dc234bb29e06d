"""Speed up a transformers model that your program already holds, and measure what it brings.

python examples/own_model.py  # SmolLM2-135M-Instruct with the draft head that comes with mcsd
python examples/own_model.py --model MODEL --draft DRAFT  # yours, with a smaller sibling or a trained head as draft
"""

import argparse
import time
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mcsd
import mcsd.hf

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
parser.add_argument("--draft", default="smollm2-135m-head")
parser.add_argument("--tree", default="2x1", help="with auto, the first call of each system measures the pair")
parser.add_argument("--tokens", type=int, default=32)
parser.add_argument("--rounds", type=int, default=2)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.model)
question = [{"role": "user", "content": "Why is the sky blue? Answer in five sentences."}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

# Keep these two objects: they keep the draft, the memory of keys and values, and the measurements of tree "auto".
speculative = mcsd.hf.speculative(args.draft, tree=args.tree)
engine = mcsd.Engine(model, args.draft, tokenizer, tree=args.tree, optimize=True, prefix_cache=0)


def new_tokens(system: str) -> list[int]:
    """The greedy answer of a system."""
    if system == "engine, optimized":
        [done] = engine.generate(inputs, temperature=0, max_new_tokens=args.tokens)
        return [*done.token_ids]
    decoding = {"custom_generate": speculative} if system == "custom_generate" else {}
    output = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, **decoding)
    return [*output[0, inputs["input_ids"].shape[1] :].tolist()]


systems = ("model.generate", "custom_generate", "engine, optimized")
texts = {system: new_tokens(system) for system in systems}  # not timed: loads the draft, measures, compiles
rates: dict[str, list[float]] = {system: [] for system in systems}
for _ in range(args.rounds):  # in turns, so that a change of the machine's speed affects all alike
    for system in systems:
        start = time.perf_counter()
        rates[system].append(len(new_tokens(system)) / (time.perf_counter() - start))

print(tokenizer.decode(texts["model.generate"]))
for system in systems:
    same = "same text" if texts[system] == texts["model.generate"] else "another text: bfloat16 rounds near-ties apart"
    ratio = median(rates[system]) / median(rates["model.generate"])
    print(f"{system:18} {median(rates[system]):6.1f} tokens/s  {ratio:.2f} x generate  {same}")
[done] = engine.generate(inputs, temperature=0, max_new_tokens=args.tokens)
length = done.stats.mean_acceptance_length
print(f"{length:.2f} tokens per forward of the target: at most so much faster than plain decoding in the same engine.")
print("The rest of the optimized engine's speed is its packed layers. Below 1.00 x, the draft costs too much.")
