"""``custom_generate``: everything that ``model.generate`` does without beams, with the same result."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mcsd
from mcsd.errors import InvalidParameter
from support.tiny import tiny

PROMPTS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 4, 11, 12, 13, 30]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
"""A batch with left padding."""


@functools.cache
def pair() -> tuple[Any, Any]:
    """A target whose argmax is clear, and a draft that is often right."""
    target, draft = tiny("llama"), tiny("llama", seed=1)
    target.generation_config.pad_token_id = 0
    return target, draft


def both(speculator: Any = None, prompts: Tensor = PROMPTS, **arguments: Any) -> tuple[Any, Any]:
    """The results of ``generate`` and of mcsd in it."""
    target, draft = pair()
    speculator = speculator or mcsd.hf.speculative(draft, tree="3x2x1")
    given = {"max_new_tokens": 12, "do_sample": False, **arguments}
    if prompts is PROMPTS:
        given.setdefault("attention_mask", MASK)
    return target.generate(prompts, **given), target.generate(prompts, custom_generate=speculator, **given)


def add_parity(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A user's processor that depends on all tokens, padding included."""
    index = torch.arange(scores.shape[1])
    return scores + 5.0 * ((index + input_ids.sum(-1, keepdim=True)) % 5 == 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no padding token": {"pad_token_id": None},
    "penalty": {"repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    "bad words": {"bad_words_ids": [[i] for i in range(10, 60)]},
    "suppressed": {"suppress_tokens": [*range(20)], "begin_suppress_tokens": [*range(20, 40)]},
    "forced": {"forced_eos_token_id": 17, "forced_bos_token_id": 3},
    "end tokens": {"eos_token_id": [*range(0, 90, 3)], "min_new_tokens": 5},
    "minimal length": {"eos_token_id": [*range(0, 90, 2)], "min_length": 11},
    "growing end": {"eos_token_id": 4, "exponential_decay_length_penalty": (2, 1.9)},
    "sequence bias": {"sequence_bias": [[[7], 4.0], [[8, 9], -3.0]]},
    "user's processor": {"logits_processor": transformers.LogitsProcessorList([add_parity])},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [row + 5, row + 7, row + 2 * len(ids)]},
    "encoder penalties": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 1},
    "max length": {"max_new_tokens": None, "max_length": 15},
    "watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=4.0)},
    # Without an end token, transformers goes on with a row that has ended, as long as others go on.
    "criterion": {
        "stopping_criteria": transformers.StoppingCriteriaList([lambda ids, _: ids[:, -1] % 4 == 1]),
        "eos_token_id": 1,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_texts_are_those_of_generate(name: str) -> None:
    expected, found = both(**SETTINGS[name])
    assert torch.equal(found, expected)


class ByRow:
    """A processor and a criterion that treat the rows of a batch differently."""

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:
        if scores is None:
            return torch.tensor([row > 0 and ids[-1] % 3 == 0 for row, ids in enumerate(input_ids.tolist())])
        allowed = [torch.arange(scores.shape[1]) >= (40 if row == 0 else 60) for row in range(len(scores))]
        return scores.masked_fill(~torch.stack(allowed), -torch.inf)


class Never(transformers.generation.EosTokenCriteria):
    """A user's subclass, which does something else."""

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        return input_ids[:, -1] == 5


MORE: dict[str, dict[str, Any]] = {
    "rows": {"logits_processor": [ByRow()]},
    "criterion of rows": {"stopping_criteria": [ByRow()], "eos_token_id": 1},
    "penalty that counts padding": {"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(5.0)]},
    "encoder penalty of several": {"encoder_no_repeat_ngram_size": 1, "num_return_sequences": 2, "top_k": 1},
    "subclass of a criterion": {"stopping_criteria": [Never(1)], "eos_token_id": 2},
    "end tokens outside of the vocabulary": {"eos_token_id": [5000, 8]},
    "limit within the prompt": {"stopping_criteria": [transformers.MaxLengthCriteria(4)]},
}


@pytest.mark.parametrize("name", MORE)
def test_arguments_of_few_users(name: str) -> None:
    given = dict(MORE[name])
    for key, kind in (
        ("logits_processor", transformers.LogitsProcessorList),
        ("stopping_criteria", transformers.StoppingCriteriaList),
    ):
        if key in given:
            given[key] = kind(given[key])
    expected, found = both(do_sample="top_k" in given, **given)
    assert torch.equal(found, expected)


def test_the_model_keeps_its_mode_and_may_change_between_calls() -> None:
    """As in training: an evaluation every few steps."""
    target, draft = tiny("llama", seed=6), tiny("llama", seed=7)
    target.train()
    speculator = mcsd.hf.speculative(draft, tree="2x2")
    long = torch.arange(3, 93)[None]
    for _ in range(2):
        found = target.generate(long, custom_generate=speculator, max_new_tokens=6, do_sample=False)
        assert target.training
        expected = target.eval().generate(long, max_new_tokens=6, do_sample=False)
        target.train()
        assert torch.equal(found, expected)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    target.to(torch.float64)
    found = target.generate(long, custom_generate=speculator, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, target.eval().generate(long, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("inside_first", [True, False])
def test_inference_mode(inside_first: bool) -> None:
    target, draft = pair()
    speculator = mcsd.hf.speculative(draft, tree="2x2")
    texts = []
    for inside in (inside_first, not inside_first):
        with torch.inference_mode(inside):
            texts.append(target.generate(PROMPTS[1:], custom_generate=speculator, max_new_tokens=6, do_sample=False))
    assert texts[0].tolist() == texts[1].tolist()


def test_a_text_that_ends_at_the_context_is_named() -> None:
    with pytest.warns(mcsd.errors.McsdWarning, match="context of 256 tokens"):
        found = pair()[0].generate(
            PROMPTS[1:], custom_generate=mcsd.hf.speculative("ngram", tree="none"), max_new_tokens=300, do_sample=False
        )
    assert found.shape == (1, 256)


def test_several_drafts() -> None:
    expected, found = both(mcsd.hf.speculative([pair()[1], "ngram"], tree="2x2"))
    assert torch.equal(found, expected)


def test_positions_of_the_user_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="position_ids"):
        both(prompts=PROMPTS[1:], position_ids=torch.tensor([[0, 1, 2, 20, 21, 40]]))


@pytest.mark.parametrize("tree", ["none", "chain:3", "2x2"])
@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_every_draft_and_tree(draft: str, tree: str) -> None:
    speculator = mcsd.hf.speculative(pair()[1] if draft == "model" else draft, tree=tree)
    for _ in range(2):
        expected, found = both(speculator, repetition_penalty=1.1)
        assert torch.equal(found, expected)


def test_one_prompt_without_a_mask() -> None:
    expected, found = both(prompts=PROMPTS[1:])
    assert torch.equal(found, expected)


def test_the_models_own_generation_config_counts() -> None:
    target = tiny("llama", seed=2)
    target.generation_config = transformers.GenerationConfig(
        suppress_tokens=[*range(40)], repetition_penalty=1.3, max_new_tokens=9, pad_token_id=0
    )
    expected = target.generate(PROMPTS[1:])
    found = target.generate(PROMPTS[1:], custom_generate=mcsd.hf.speculative("ngram"))
    assert torch.equal(found, expected)
    assert found.shape[1] == 15


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_scores_and_logits(fields: dict[str, Any]) -> None:
    """They are computed anew from the whole text: equal up to rounding."""
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = both(**asked, do_sample=False, repetition_penalty=fields.get("repetition_penalty", 1.0))
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if fields:
        torch.manual_seed(0)
        sampled = pair()[0].generate(
            PROMPTS[1:],
            custom_generate=mcsd.hf.speculative("ngram"),
            do_sample=True,
            max_new_tokens=8,
            **asked,
            **fields,
        )
        new = sampled.sequences[0, 6:]
        assert len(sampled.scores) == len(new) == 8
        # Every token had a probability under its own scores.
        assert all(bool(scores[0, token] > -1e30) for scores, token in zip(sampled.scores, new, strict=True))


def test_return_sequences_and_seeds() -> None:
    target, draft = pair()
    speculator = mcsd.hf.speculative(draft, tree="2x2")
    arguments = {"attention_mask": MASK, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = target.generate(PROMPTS, custom_generate=speculator, **arguments)
        return found

    assert sample(1).shape == (6, 14)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert len({tuple(row) for row in sample(1)[:3].tolist()}) == 3


def test_a_streamer_gets_the_prompt_and_every_token() -> None:
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    target, draft = pair()
    speculator = mcsd.hf.speculative(draft, tree="2x2")
    for bound in (mcsd.hf.speculative(draft, tree="2x2", streamer=Streamer()), None):
        streamer = Streamer()
        method = bound or functools.partial(speculator, streamer=streamer)
        streamer = bound._streamer if bound else streamer
        found = target.generate(PROMPTS[1:], custom_generate=method, max_new_tokens=7, do_sample=False)
        assert streamer.ended
        assert streamer.parts[0] == PROMPTS[1].tolist()
        assert [len(part) for part in streamer.parts[1:]] == [1] * 7
        assert [token for part in streamer.parts for token in part] == found[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_beams": 2}, "beam"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"guidance_scale": 1.5}, "ClassifierFreeGuidance"),
        ({"attention_mask": MASK.flip(1)}, "padding_side='left'"),
    ],
)
def test_what_cannot_be_exact_is_refused(arguments: dict[str, Any], said: str) -> None:
    target, draft = pair()
    with pytest.raises(InvalidParameter, match=said):
        target.generate(PROMPTS, custom_generate=mcsd.hf.speculative(draft, tree="2x2"), max_new_tokens=4, **arguments)


def test_a_streamer_takes_one_sequence() -> None:
    target, draft = pair()
    with pytest.raises(InvalidParameter, match="one sequence"):
        target.generate(
            PROMPTS,
            attention_mask=MASK,
            max_new_tokens=4,
            custom_generate=mcsd.hf.speculative(draft, streamer=object()),
        )


def test_the_calibration_of_a_pair_is_kept_while_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one changed line may be written anew for every call."""
    target, draft = tiny("llama", seed=3), tiny("llama", seed=4)
    measured: list[int] = []
    measure = mcsd.calibration._measure
    monkeypatch.setattr(mcsd.calibration, "_measure", lambda *args: measured.append(1) or measure(*args))
    for _ in range(2):
        target.generate(PROMPTS[1:], max_new_tokens=3, custom_generate=mcsd.hf.speculative(draft))
    assert len(measured) == 1
    target.generate(PROMPTS[1:], max_new_tokens=3, custom_generate=mcsd.hf.speculative(tiny("llama", seed=5)))
    assert len(measured) == 2
