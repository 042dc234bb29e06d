"""Default chat answers plain questions as well as ``model.generate`` does at the same settings.

Both sample, so answers differ. Of 60 answers (20 questions, 3 seeds), mcsd may have at most three acceptable ones less.
"""

import re

import pytest
import torch
from transformers import GenerationConfig

import mcsd
from mcsd.loading.load import read_transformers

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is 2 + 2?": r"\b4\b|four",
    "What is 10 minus 3?": r"\b7\b|seven",
    "How many days are in a week?": r"\b7\b|seven",
    "How many months are in a year?": r"\b12\b|twelve",
    "Which planet do we live on?": "Earth",
    "Which star is closest to the Earth?": r"\bSun\b|\bsun\b",
    "What color is the sky on a clear day?": "blue",
    "What color do you get when you mix blue and yellow?": "green",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "What is the opposite of hot?": "cold",
    "What is the largest ocean?": "Pacific",
    "What is frozen water called?": r"\bice\b|Ice",
    "What do bees make?": "honey|Honey",
    "What is the chemical formula of water?": r"H2O|H₂O|H_2O",
    "Which animal says meow?": r"\b[Cc]ats?\b",
    "In which continent is Egypt?": "Africa",
    "What language is spoken in Brazil?": "Portuguese",
}
SEEDS = (0, 1, 2)
_TOKENS = 40


def acceptable(question: str, answer: str) -> bool:
    return re.search(QUESTIONS[question], answer) is not None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("smollm2-135m", marks=pytest.mark.slow),
        pytest.param("qwen2.5-coder-1.5b", marks=pytest.mark.large),
    ],
)
def test_default_answers(name: str) -> None:
    engine = mcsd.Engine.load(name, dtype="bfloat16", max_length=512)
    network, tokenizer = read_transformers(name, torch.bfloat16)
    defaults = engine.defaults
    config = GenerationConfig(
        do_sample=defaults.temperature > 0,
        temperature=defaults.temperature or None,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        repetition_penalty=defaults.repetition_penalty,
        max_new_tokens=_TOKENS,
        eos_token_id=sorted(engine.target.eos_token_ids | {tokenizer.eos_token_id}),
    )
    ours = theirs = 0
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = torch.tensor([engine.chat_tokens(messages)])
        for seed in SEEDS:
            ours += acceptable(question, engine.chat(messages, seed=seed, max_new_tokens=_TOKENS).text)
            torch.manual_seed(seed)
            output = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            theirs += acceptable(question, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    print(f"{name}: {ours} acceptable answers, {theirs} of model.generate")
    assert theirs >= len(QUESTIONS)  # The questions are plain enough for the model.
    assert ours >= theirs - 3


@pytest.mark.slow
def test_the_capital_of_france_ten_times() -> None:
    engine = mcsd.Engine.load("smollm2-135m")
    for seed in range(10):
        answer = engine.chat([{"role": "user", "content": "What is the capital of France?"}], seed=seed)
        assert "Paris" in answer.text
