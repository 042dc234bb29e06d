"""transformers' own ``model.generate`` on the same weights: plain, with prompt look-up, and with an assistant model."""

from pathlib import Path
from typing import Any, TypeGuard

import torch

from mcsd.bench.experiment import ASSISTED, GENERATE, LOOKUP
from mcsd.loading.load import read_transformers
from mcsd.models import LanguageModel, TransformersModel

LOOKUP_TOKENS = 3
"""Tokens that prompt look-up proposes."""


class TransformersBaselines:
    """``generate`` with the settings of an `mcsd.SamplingParams` that has nothing but a temperature.

    Args:
        target: a network of transformers.
        draft: another one with the same vocabulary, for `ASSISTED`.
    """

    def __init__(self, target: Any, draft: Any | None = None) -> None:
        self._target = target.eval()
        self._options: dict[str, dict[str, Any]] = {GENERATE: {}, LOOKUP: {"prompt_lookup_num_tokens": LOOKUP_TOKENS}}
        if draft is not None:
            self._options[ASSISTED] = {"assistant_model": draft.eval()}

    @classmethod
    def load(
        cls, target: str | Path, draft: str | Path | None, device: torch.device, dtype: torch.dtype
    ) -> "TransformersBaselines":
        """Load both as transformers does: not packed, not quantized, not compiled.

        Raises:
            ModelError: see `mcsd.loading.load.read_transformers`.
        """
        return cls(*(read_transformers(name, dtype, device)[0] for name in (target, draft) if name is not None))

    @classmethod
    def of(cls, target: LanguageModel, draft: Any) -> "TransformersBaselines | None":
        """Those of models given as objects, on their own networks; None where transformers does not run the target."""
        if not _is_unchanged(target):
            return None
        return cls(target.network, draft.network if _is_unchanged(draft) else None)

    def fault(self, baseline: str, prompt: list[int]) -> str | None:
        """Why a baseline does not run on these models; None if it answers a prompt with a token."""
        if baseline not in self._options:
            return "the draft is not a model of transformers"
        try:
            self.answer(baseline, prompt, 0, 0.0, 1)
        except Exception as error:  # Models and their generation configs may raise anything.
            return f"transformers refuses: {' '.join(str(error).split()) or type(error).__name__:.120}"
        return None

    def answer(self, baseline: str, prompt: list[int], seed: int, temperature: float, max_new_tokens: int) -> list[int]:
        """The new tokens after a prompt.

        Args:
            baseline: `GENERATE`, `LOOKUP`, or `ASSISTED` if there is a draft.
            prompt: token ids.
            seed, temperature, max_new_tokens: as in `mcsd.SamplingParams`.
        """
        torch.manual_seed(seed)
        # Its default top_k of 50 and the penalties of the model's generation config are switched off.
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        inputs = torch.tensor([prompt], device=self._target.device)
        output = self._target.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            **sampling,
            **self._options[baseline],
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def _is_unchanged(model: Any) -> TypeGuard[TransformersModel]:
    """Whether a model is a network as transformers made it: not packed, not quantized, with its whole vocabulary."""
    if not isinstance(model, TransformersModel) or model.vocabulary is not None:
        return False
    return model.precision == str(model.dtype).removeprefix("torch.")
