"""OpenVINO GenAI as a peer of ``benchmarks/speed.py``, in an environment of its own that has openvino-genai.

    python openvinogenai.py TARGET.gguf [--draft FOLDER] [--tokens 3]

It takes a draft only in its own format: a folder where ``LLMPipeline("x.gguf", "CPU", enable_save_ov_model=True)`` has
left one. Of Qwen2.5-Coder 0.5B it does not read the catalogue's file, for its Q5_0 tensors; in Q8_0 they will do.

Reads requests from stdin, a JSON object a line with the prompt's token ids, temperature, new tokens at most and a seed;
answers each with new tokens and seconds. It runs in the file's own quantization and samples from all tokens.
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
    # A prompt that was seen before is read again, as by all others.
    scheduler.enable_prefix_caching = False
    options = {"scheduler_config": scheduler, **threads}
    if args.draft:
        options["draft_model"] = openvino_genai.draft_model(args.draft, "CPU", **threads)
    model = openvino_genai.LLMPipeline(args.target, "CPU", **options)
    end = model.get_tokenizer().get_eos_token_id()
    for line in sys.stdin:
        asked = json.loads(line)
        # Of its own, not the file's: no top_k, top_p or penalty.
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = asked["new"]
        config.set_eos_token_id(end)
        config.do_sample = asked["temperature"] > 0
        if config.do_sample:
            config.temperature, config.rng_seed = asked["temperature"], asked["seed"]
        if args.draft:
            config.num_assistant_tokens = args.tokens
        start = time.perf_counter()
        (new,) = model.generate(openvino.Tensor(np.array([asked["ids"]])), config).tokens
        print(json.dumps({"tokens": len(new), "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
