"""The prompts that are tried where the user gives none: plain text, and what people ask."""

from mcsd.engine import Engine
from mcsd.errors import EmptyPrompt

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


def built_in(engine: Engine) -> list[list[int]]:
    """The prompts as token ids, plain ones and questions in turn; questions in the chat template, if there is one.

    Raises:
        EmptyPrompt: the engine has no tokenizer.
    """
    if engine.tokenizer is None:
        raise EmptyPrompt("no prompts, and no tokenizer for the built-in ones", "give prompts as token ids")
    chats = getattr(engine.tokenizer, "chat_template", None) is not None
    prompts = []
    for text, question in zip(PLAIN, ASKED, strict=True):
        prompts.append(engine.request(text).prompt)
        asked = [{"role": "user", "content": question}]
        prompts.append(engine.chat_tokens(asked) if chats else engine.request(question).prompt)
    return prompts
