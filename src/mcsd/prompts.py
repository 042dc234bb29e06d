"""The prompts that are tried where the user gives none: plain text, and what people ask."""

from mcsd.encoding import Encoder
from mcsd.params import SamplingParams

PLAIN = (
    "The sun had not yet risen when",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1. Bread\n2. Milk\n3.",
)
ASKED = (
    "Name three rivers and say where they flow.",
    "What is the difference between a virus and a bacterium?",
    "Translate into German: The train leaves at nine.",
    "Write a short poem about autumn.",
)


def built_in(encoder: Encoder) -> list[list[int]]:
    """The prompts as token ids, plain ones and questions in turn; questions in the chat template, if there is one.

    Raises:
        RequestError: the encoder has no tokenizer or a template that refuses them, or they are too long for it.
    """
    params, prompts = SamplingParams(), []
    for text, question in zip(PLAIN, ASKED, strict=True):
        prompts.append(encoder.encode(text, params))
        asked = [{"role": "user", "content": question}]
        prompts.append(encoder.chat(asked) if encoder.chats else encoder.encode(question, params))
    return prompts
