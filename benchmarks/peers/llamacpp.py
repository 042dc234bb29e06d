"""llama.cpp as a peer of ``mcsd bench``, in an environment of its own with llama-cpp-python installed.

    python llamacpp.py TARGET.gguf [--draft DRAFT.gguf] [--tokens 3]

The protocol is that of ``mcsd.bench.peers``. It runs in the file's own quantization and samples from all tokens.
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
    """A draft model that proposes its most probable tokens."""

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
    draft = None
    if args.draft:
        draft = Greedy(Llama(args.draft, **options), args.tokens)
    model = Llama(args.target, draft_model=draft, logits_all=draft is not None, **options)
    for line in sys.stdin:
        request = json.loads(line)
        model.reset()
        model.set_seed(request["seed"])
        new: list[int] = []
        start = time.perf_counter()
        sampling = {"temp": request["temperature"], "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        for token in model.generate(request["prompt_token_ids"], **sampling):
            if token == model.token_eos():
                break
            new.append(token)
            if len(new) == request["max_new_tokens"]:
                break
        print(json.dumps({"token_ids": new, "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
