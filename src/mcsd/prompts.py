"""What is asked where the user gives no prompts: what people ask of a model that answers, and texts to go on with."""

from mcsd.encoding import Encoder

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


def built_in(encoder: Encoder) -> list[list[int]]:
    """Questions in the chat template as token ids; where there is none, beginnings of texts.

    Raises:
        RequestError: the encoder has no tokenizer or a template that refuses them, or they are too long for it.
    """
    return [encoder.ask(text) for text in (QUESTIONS if encoder.chats else BEGINNINGS)]
