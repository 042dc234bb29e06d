"""One rank of a model in tensor parallel: ``torchrun tensor_parallel.py MODEL RESULTS``."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import mcsd

PROMPTS = [[1, 5, 7, 9], [2, 3]]
SAMPLING = ({"seed": 7}, {"temperature": 0})


def texts(engine: mcsd.Engine) -> list[Any]:
    """Token ids of all prompts, sampled and greedy."""
    return [done.token_ids for fields in SAMPLING for done in engine.generate(PROMPTS, max_new_tokens=24, **fields)]


def main(folder: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        difference = float((model(ids).logits - whole(ids).logits).abs().max())
    made = {
        "difference": difference,
        "shard": list(model.model.layers[0].self_attn.q_proj.weight.to_local().shape),
        "look-up": texts(mcsd.Engine(model, "ngram", tree="chain:3", max_batch=2)),
        "draft": texts(mcsd.Engine(model, whole, tree="2x2", max_batch=2)),
        "alone": texts(mcsd.Engine(whole, "ngram", tree="chain:3", max_batch=2)),
        "draft alone": texts(mcsd.Engine(whole, whole, tree="2x2", max_batch=2)),
    }
    Path(results, f"{os.environ['RANK']}.json").write_text(json.dumps(made))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
