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
    pairs = zip(PLAIN, ASKED, strict=True)
    return [ids for text, question in pairs for ids in (encoder.encode(text, SamplingParams()), encoder.ask(question))]
