"""Same text as ``model.generate`` at temperature 0 in float32, for tiny models of the families that mcsd names.

Prompts and texts are longer than the sliding windows. The texts of a padded batch are those of each prompt alone.
"""

from functools import cache
from typing import Any

import pytest
import torch

import mcsd
from support.families import FAMILIES, noisy_copy, tiny_family

LENGTHS = (3, 19, 11, 8)
NEW = 14
PENALTY = 1.3
TREE = "3x2x1"


@cache
def pair(family: str) -> tuple[Any, Any]:
    target = tiny_family(family)
    return target, noisy_copy(target)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 88, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Texts as a tokenizer returns them, with pads on the left."""
    longest = max(map(len, texts))
    ids = [[0] * (longest - len(text)) + text for text in texts]
    masks = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


@cache
def expected(family: str, number: int, penalty: float) -> tuple[int, ...]:
    """What ``model.generate`` says to one prompt."""
    prompt = prompts()[number]
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
    output = pair(family)[0].generate(ids, **options, repetition_penalty=penalty)
    return tuple(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("penalty", [1.0, PENALTY])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_gives_the_texts_of_each_prompt_alone(name: str, penalty: float) -> None:
    engine = mcsd.Engine(*pair(name), tree=TREE, max_batch=4)
    done = engine.generate(padded(prompts()), temperature=0, max_new_tokens=NEW, repetition_penalty=penalty)
    assert [completion.token_ids for completion in done] == [expected(name, i, penalty) for i in range(4)]
    if penalty == 1.0:
        assert sum(completion.stats.accepted_tokens for completion in done) > NEW


@pytest.mark.parametrize("name", FAMILIES)
def test_one_text_beyond_the_sliding_window(name: str) -> None:
    engine = mcsd.Engine(*pair(name), tree="chain:3", max_batch=1)
    for penalty in (1.0, PENALTY):
        done = engine.generate(prompts()[1], temperature=0, max_new_tokens=NEW, repetition_penalty=penalty)
        assert done.token_ids == expected(name, 1, penalty)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_matters(name: str) -> None:
    """Else these tests would see no fault: the first token of a prompt changes the logits of its last one."""
    network = pair(name)[0]
    ids = torch.tensor([prompts()[3]] * 2)
    # Within the window of every layer.
    ids = ids[:, :6]
    ids[1, 0] += 1
    with torch.no_grad():
        logits = network(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    assert (logits[0] - logits[1]).std() > 0.05 * logits.std()
