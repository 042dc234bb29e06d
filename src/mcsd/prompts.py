"""What is asked where the user gives no prompts: what people ask of a model that answers, and texts to go on with."""

from mcsd.encoding import Encoder
from mcsd.params import SamplingParams

QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Give three tips for staying awake during a long lecture.",
    "Write a short letter that invites a friend to a picnic.",
    "Describe how bread is baked, step by step.",
    "What are the main differences between a lake and a river?",
    "Rewrite this sentence in the past tense: She walks to the market and buys apples.",
    "Write a Python function that counts the vowels of a string.",
    "Name four professions in which people work at night, and say why.",
)
BEGINNINGS = (
    "The sun had not yet risen when",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1. Bread\n2. Milk\n3.",
    "The committee met on Tuesday to discuss",
    "Q: What is the capital of Norway?\nA:",
    "In the spring of 1912 a young engineer",
    "Dear Sir or Madam,\n\n",
)


def usual(encoder: Encoder) -> list[list[int]]:
    """What a model is for, as token ids: questions in the chat template; where there is none, beginnings of texts.

    Raises:
        RequestError: the encoder has no tokenizer or a template that refuses them, or they are too long for it.
    """
    return [encoder.ask(text) for text in (QUESTIONS if encoder.chats else BEGINNINGS)]


def varied(encoder: Encoder) -> list[list[int]]:
    """Four beginnings of texts and four questions in turn, the questions in the chat template if there is one.

    Raises:
        RequestError: as `usual`.
    """
    pairs = zip(BEGINNINGS[:4], QUESTIONS[:4], strict=True)
    return [ids for text, question in pairs for ids in (encoder.encode(text, SamplingParams()), encoder.ask(question))]
