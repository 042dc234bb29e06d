"""Hugging Face's own generation on the same weights, as transformers loads them."""

from typing import Any

import torch

from mcsd.models.loading import read


def answer(network: Any, prompt: list[int], seed: int, temperature: float, new: int, **options: Any) -> list[int]:
    """``generate`` at the settings of an `mcsd.SamplingParams` with nothing but a temperature.

    Args:
        network: of transformers.
        prompt: token ids.
        seed, temperature: as there; new: at most this many tokens.
        options: more for ``generate``, such as ``assistant_model``.

    Returns:
        The new tokens.
    """
    torch.manual_seed(seed)
    # Its own top_k=50, and the penalties of the weights' own generation config, are switched off.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    inputs = torch.tensor([prompt], device=network.device)
    output = network.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new,
        repetition_penalty=1.0,
        **sampling,
        **options,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


class Assisted:
    """Assisted generation.

    Args:
        target, draft: networks of transformers with one vocabulary.
    """

    def __init__(self, target: Any, draft: Any) -> None:
        self._target = target.eval()
        self._draft = draft.eval()

    @classmethod
    def load(cls, target: str, draft: str, device: torch.device, dtype: torch.dtype) -> "Assisted":
        """Read both as they are: not packed, not quantized, not compiled.

        Raises:
            ModelError: see `mcsd.models.loading.read`.
        """
        return cls(*(read(name, dtype)[0].to(device) for name in (target, draft)))

    def answer(self, prompt: list[int], seed: int, temperature: float, new: int) -> list[int]:
        """The new tokens after a prompt."""
        return answer(self._target, prompt, seed, temperature, new, assistant_model=self._draft)
