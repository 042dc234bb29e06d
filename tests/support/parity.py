"""Token for token what ``model.generate`` says at temperature 0.

A difference is allowed only at a proven tie: the reference's two largest logits there within 1e-4. Ties are counted.
"""

from typing import Any

import torch

import mcsd

TIE = 1e-4
TREES = ["4x2x2x1", "chain:4", "none", [-1, -1, -1, 0, 0, 1, 3, 3, 6]]


def reference(network: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, repetition_penalty=1.0
    )
    return output[0, len(prompt) :].tolist()


def is_tie(network: Any, tokens: list[int]) -> bool:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        top = network(ids, attention_mask=torch.ones_like(ids)).logits[0, -1].topk(2).values
    return bool(top[0] - top[1] < TIE)


def compare(network: Any, expected: list[list[int]], ids: list[list[int]], done: list[mcsd.Completion]) -> int:
    ties = 0
    for prompt, wanted, completion in zip(ids, expected, done, strict=True):
        got = list(completion.token_ids)
        if got != wanted:
            same = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
            assert is_tie(network, prompt + wanted[:same]), (prompt, same, got, wanted)
            ties += 1
    return ties
