"""OpenVINO GenAI as a peer of ``mcsd bench``, in an environment of its own with openvino-genai installed.

    python openvinogenai.py TARGET.gguf [--draft FOLDER] [--tokens 3]

It takes a draft only in its own format: a folder where ``LLMPipeline("x.gguf", "CPU", enable_save_ov_model=True)`` has
left one. It cannot read the catalogue's file of Qwen2.5-Coder 0.5B, which has Q5_0 tensors; a file in Q8_0 works.

The protocol is that of ``mcsd.bench.peers``. It runs in the file's own quantization and samples from all tokens.
"""

import argparse
import json
import sys
import time

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=3, help="that the draft proposes")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    threads = {"INFERENCE_NUM_THREADS": args.threads}
    scheduler = openvino_genai.SchedulerConfig()
    # Prefill is timed even where the prompt was seen before, as in all systems.
    scheduler.enable_prefix_caching = False
    options = {"scheduler_config": scheduler, **threads}
    if args.draft:
        options["draft_model"] = openvino_genai.draft_model(args.draft, "CPU", **threads)
    model = openvino_genai.LLMPipeline(args.target, "CPU", **options)
    end = model.get_tokenizer().get_eos_token_id()
    for line in sys.stdin:
        request = json.loads(line)
        # A new config has no top_k, top_p or penalty, unlike the file's.
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request["max_new_tokens"]
        config.set_eos_token_id(end)
        config.do_sample = request["temperature"] > 0
        if config.do_sample:
            config.temperature, config.rng_seed = request["temperature"], request["seed"]
        if args.draft:
            config.num_assistant_tokens = args.tokens
        start = time.perf_counter()
        (new,) = model.generate(openvino.Tensor(np.array([request["prompt_token_ids"]])), config).tokens
        print(
            json.dumps({"token_ids": [int(token) for token in new], "seconds": time.perf_counter() - start}), flush=True
        )


if __name__ == "__main__":
    main()
