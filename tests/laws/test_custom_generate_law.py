"""``model.generate(custom_generate=...)`` follows the distribution of ``model.generate``, by chi-square.

The expected probability of every text comes from transformers' own processors and warpers, on logits of the network
after each beginning of the text, with the padding of the row before it.

False alarms: five tests at the level 10⁻⁴, so a correct method fails this file on one seed in 2,000 at most. Power
(`test_processors_that_do_not_see_the_path_are_rejected`): a processor that sees the prompt only is rejected with a
p-value below 10⁻¹².
"""

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import chisquare
from torch import Tensor

import mcsd
from support.chisquare import SEED

SIZE, LENGTH, TEXTS = 4, 3, 5_000
TOGETHER = 50
"""Texts of a row in one call: a processor is called with as many rows for each of them."""
LEVEL = 1e-4
PROMPTS = torch.tensor([[0, 0, 1, 2], [3, 1, 2, 0]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
EOS = 3


def network(seed: int) -> Any:
    torch.manual_seed(100 * SEED + seed)
    config = transformers.LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.4)
    return model.eval()


def by_sum(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A user's processor that depends on all tokens."""
    index = torch.arange(scores.shape[1])
    return scores + 1.5 * ((index + input_ids.sum(-1, keepdim=True)) % 3 == 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "warpers": {"temperature": 0.8, "top_k": 3, "typical_p": 0.9},
    "user's processor and penalty": {"logits_processor": [by_sum], "repetition_penalty": 1.3, "top_p": 0.95},
    "end and bad words": {"eos_token_id": EOS, "min_new_tokens": 1, "bad_words_ids": [[1, 2]], "eta_cutoff": 0.02},
    "end": {"eos_token_id": EOS, "temperature": 1.3},
}


def call(model: Any, settings: dict[str, Any], **more: Any) -> Tensor:
    own = dict(settings)
    if "logits_processor" in own:
        own["logits_processor"] = transformers.LogitsProcessorList(own["logits_processor"])
    result: Tensor = model.generate(
        PROMPTS, attention_mask=MASK, do_sample=True, max_new_tokens=LENGTH, **{"top_k": 0, **own, **more}
    )
    return result


def sample(model: Any, settings: dict[str, Any], scheme: str, tree: str) -> list[Tensor]:
    """`TEXTS` texts ``[TEXTS / 2, LENGTH]`` of each of both rows: the padded one, and the other."""
    speculator = mcsd.hf.speculative(network(2), tree=tree, scheme=scheme, max_batch=2 * TOGETHER)
    torch.manual_seed(SEED)
    calls = [
        call(model, settings, custom_generate=speculator, num_return_sequences=TOGETHER)[:, PROMPTS.shape[1] :]
        for _ in range(TEXTS // 2 // TOGETHER)
    ]
    return [torch.cat([found.split(TOGETHER)[row] for found in calls]) for row in range(2)]


def expected(model: Any, settings: dict[str, Any], row: int) -> dict[tuple[int, ...], float]:
    """The probability of each text of a row, padded with 0 after its end."""
    prepared: list[Any] = []

    def catch(model: Any, input_ids: Tensor, logits_processor: Any, **others: Any) -> Tensor:
        prepared.append(logits_processor)
        return input_ids

    call(model, settings, custom_generate=catch)
    law: dict[tuple[int, ...], float] = {}
    start = int((MASK[row] == 0).sum())
    for text in product(range(SIZE), repeat=LENGTH):
        chance = 1.0
        end = text.index(EOS) + 1 if settings.get("eos_token_id") == EOS and EOS in text else LENGTH
        for i in range(end):
            whole = torch.cat([PROMPTS, torch.tensor([text[:i]] * 2, dtype=torch.int64)], dim=1)
            with torch.no_grad():
                logits = model(whole[row : row + 1, start:]).logits[:, -1].expand(2, -1).clone()
            chance *= float(prepared[0](whole, logits)[row].softmax(-1)[text[i]])
        law[(*text[:end], *[0] * (LENGTH - end))] = chance
    return law


def p_value(rows: Tensor, law: dict[tuple[int, ...], float]) -> float:
    seen = dict.fromkeys(law, 0)
    for text in rows.tolist():
        seen[tuple(text)] += 1
    assert not any(seen[text] for text, chance in law.items() if not chance)
    cells = [(seen[text], chance * len(rows)) for text, chance in law.items() if chance]
    small = [cell for cell in cells if cell[1] < 5]
    large = [cell for cell in cells if cell[1] >= 5] + ([tuple(map(sum, zip(*small, strict=True)))] if small else [])
    found, wanted = zip(*large, strict=True)
    # Sums agree up to rounding.
    scale = sum(found) / sum(wanted)
    return float(chisquare(found, [each * scale for each in wanted]).pvalue)


@pytest.mark.parametrize(
    ("name", "scheme", "tree"),
    [*((name, "mcss-wor", "2x1") for name in SETTINGS), ("user's processor and penalty", "traversal", "2x2")],
)
def test_law(name: str, scheme: str, tree: str) -> None:
    model, settings = network(1), SETTINGS[name]
    for row, rows in enumerate(sample(model, settings, scheme, tree)):
        assert p_value(rows, expected(model, settings, row)) > LEVEL / 2


def test_processors_that_do_not_see_the_path_are_rejected() -> None:
    model = network(1)

    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        return by_sum(input_ids[:, : PROMPTS.shape[1]], scores)

    _, rows = sample(model, {"logits_processor": [broken]}, "mcss-wor", "2x1")
    assert p_value(rows, expected(model, {"logits_processor": [by_sum]}, 1)) < 1e-12
