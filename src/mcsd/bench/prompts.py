"""What is asked where the user gives no prompts, in the manner of the paper's two tasks; and prompts to token ids."""

from collections.abc import Mapping, Sequence

from mcsd.encoding import Encoder
from mcsd.errors import EmptyPrompt
from mcsd.params import SamplingParams
from mcsd.prompts import QUESTIONS

SENTENCES = (
    "The library will be closed on Monday because of a public holiday.",
    "She opened the window and listened to the rain for a while.",
    "The new bridge was finished two years later than planned.",
    "Scientists have found traces of water in the samples that the probe brought back.",
    "Most passengers prefer the early train because it is less crowded.",
    "The city council decided yesterday to plant a thousand trees.",
    "He forgot his keys and had to wait in front of the house until evening.",
    "Prices for bread and milk have risen again this spring.",
)


def built_in() -> dict[str, list[str]]:
    """Questions, and sentences to be translated in the paper's words."""
    template = "Translate the input English sentence into German.\nInput: {}\nOutput: "
    return {"questions": list(QUESTIONS), "translation": [template.format(sentence) for sentence in SENTENCES]}


def spaced(prompts: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of them, evenly spaced."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def encoded(prompts: Mapping[str, Sequence[str | list[int]]], encoder: Encoder) -> dict[str, list[list[int]]]:
    """Prompts as token ids, by set.

    Args:
        prompts: texts or token ids.
        encoder: of the target; where it has a chat template, texts are questions for that.

    Raises:
        RequestError: a prompt is empty or too long, or there is none.
    """
    if not prompts or not all(prompts.values()):
        raise EmptyPrompt("no prompts, or a set without any", "give one")
    plainly = SamplingParams()
    return {
        name: [encoder.encode(encoder.ask(text) if isinstance(text, str) else text, plainly) for text in texts]
        for name, texts in prompts.items()
    }
