"""llama.cpp as a peer of ``benchmarks/speed.py``, in an environment of its own that has llama-cpp-python.

    python llamacpp.py TARGET.gguf [--draft DRAFT.gguf] [--tokens 3]

Reads requests from stdin, a JSON object a line with the prompt's token ids, temperature, new tokens at most and a seed;
answers each with new tokens and seconds. It runs in the file's own quantization and samples from all tokens.
"""

import argparse
import json
import sys
import time

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaDraftModel

_CONTEXT = 2048


class Greedy(LlamaDraftModel):
    """A smaller model that proposes its likeliest tokens."""

    def __init__(self, model: Llama, tokens: int) -> None:
        self._model = model
        self._tokens = tokens

    def __call__(self, input_ids, /, **_):
        """See ``LlamaDraftModel``."""
        proposed: list[int] = []
        for token in self._model.generate(input_ids.tolist(), temp=0.0):
            proposed.append(token)
            if len(proposed) == self._tokens:
                break
        return np.array(proposed, dtype=np.intc)


def main() -> None:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=3, help="that the draft proposes")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    options = {"n_ctx": _CONTEXT, "n_threads": args.threads, "n_threads_batch": args.threads, "verbose": False}
    helper = None
    if args.draft:
        helper = Greedy(Llama(args.draft, **options), args.tokens)
    model = Llama(args.target, draft_model=helper, logits_all=helper is not None, **options)
    for line in sys.stdin:
        asked = json.loads(line)
        model.reset()
        model.set_seed(asked["seed"])
        new: list[int] = []
        start = time.perf_counter()
        sampling = {"temp": asked["temperature"], "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        for token in model.generate(asked["ids"], **sampling):
            if token == model.token_eos():
                break
            new.append(token)
            if len(new) == asked["new"]:
                break
        print(json.dumps({"tokens": len(new), "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
