"""A script of a user of Ray: complete the prompts of a dataset on two engines, and print the rows as JSON."""

import json
import sys

import pytest
import ray

import mcsd
from mcsd.errors import InvalidOption, InvalidParameter
from mcsd.ray import map_batches

TALK = [{"role": "user", "content": "Tell me the capital of France."}]
PROMPTS = {
    "texts": ["Once upon a time", "The sun", "One, two, three,", ""],
    "token ids": [[504, 3575], [504], [28, 198, 504], [1 << 20]],
    "messages": [TALK, [{"role": "system", "content": "Answer in one word.", "name": "x"}, *TALK]],
}


def main() -> None:
    params = {"temperature": 0, "max_new_tokens": 12}
    with pytest.raises(InvalidOption, match="'trees'"):
        map_batches(None, trees="2x1")
    with pytest.raises(InvalidParameter, match="top_p"):
        map_batches(None, params={"top_p": 2})
    with pytest.raises(InvalidParameter, match="n=2"):
        map_batches(None, params=mcsd.SamplingParams(n=2))
    with pytest.raises(InvalidOption, match="concurrency"):
        map_batches(None, concurrency=0)
    engine = mcsd.Engine.load("smollm2-135m", tree="2x1")
    for kind, prompts in PROMPTS.items():
        dataset = ray.data.from_items([{"number": i, "prompt": one} for i, one in enumerate(prompts)])
        done = map_batches(
            dataset, params=params, target="smollm2-135m", tree="2x1", concurrency=2, batch_size=2, num_cpus=1
        )
        rows = sorted(done.take_all(), key=lambda row: row["number"])
        assert [row["number"] for row in rows] == list(range(len(prompts)))
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt in ("", [1 << 20]):
                assert row["completion"] is row["finish_reason"] is None
                assert ("outside" if prompt else "empty") in row["error"]
                continue
            own = engine.chat(prompt, **params) if kind == "messages" else engine.generate(prompt, **params)
            assert (row["completion"], list(row["token_ids"])) == (own.text, list(own.token_ids))
            assert (row["finish_reason"], row["error"]) == (own.finish_reason, None)
    print(json.dumps({"rows": sum(map(len, PROMPTS.values()))}))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200e6, log_to_driver=False)
    try:
        main()
    finally:
        ray.shutdown()
    sys.exit()
