"""Logits processors: what users and generation configs change, forbid or force at each token.

The classes of transformers do the work. A processor is called for every node of a tree whose distribution is needed,
with the tokens that lead to that node, so the output follows the processed distribution exactly. It must be a function
of its arguments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mcsd.params import LogitsProcessor, SamplingParams


class ProcessorChain:
    """Processors one after the other, on a device. A processor that fails makes the logits NaN: its request ends.

    Args:
        processors: called in this order.
        device: of their arguments.

    Attributes:
        error: what a processor raised, or None.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], device: torch.device) -> None:
        self._processors = processors
        self._device = device
        self.error: Exception | None = None

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """The processed logits ``[1, V]``, on the device of the given ones."""
        ids, scores = input_ids.to(self._device), logits.to(self._device)
        try:
            for processor in self._processors:
                scores = processor(ids, scores)
            return torch.as_tensor(scores).to(logits).view_as(logits)
        except Exception as error:
            # It is code of the user and may raise anything; other requests go on.
            self.error = error
            return torch.full_like(logits, torch.nan)


def request_processors(
    params: SamplingParams,
    constraints: Mapping[str, Any],
    prompt_length: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    bad_words_ids: Sequence[Sequence[int]],
    device: torch.device,
) -> SamplingParams:
    """Sampling parameters whose ``logits_processors`` also apply bad words, the minimal length and the constraints.

    Args:
        params: of the request.
        constraints: from `mcsd.generation_config.constraint_fields`.
        prompt_length: tokens of the prompt.
        max_new_tokens: the most new tokens.
        eos_token_ids: tokens that end the text.
        bad_words_ids: ``params.bad_words`` as token ids.
        device: of the model, where the processors compute.
    """
    processors: list[LogitsProcessor] = []
    if bad_words_ids or params.min_new_tokens or constraints:
        import transformers

        eos = list(eos_token_ids)
        if bad_words_ids:
            processors.append(transformers.NoBadWordsLogitsProcessor([list(word) for word in bad_words_ids], eos))
        if params.min_new_tokens and eos:
            processors.append(
                transformers.MinNewTokensLengthLogitsProcessor(prompt_length, params.min_new_tokens, eos, str(device))
            )
        processors += constraint_processors(constraints, prompt_length, max_new_tokens, eos, device)
    processors += params.logits_processors
    if not processors:
        return params
    return replace(params, logits_processors=(ProcessorChain(processors, device),))


def constraint_processors(
    constraints: Mapping[str, Any], prompt_length: int, max_new_tokens: int, eos: list[int], device: torch.device
) -> list[LogitsProcessor]:
    """The processors of the constraints of a generation config, in the order in which ``generate`` applies them."""
    import transformers as hf

    where = str(device)
    first = prompt_length if prompt_length > 1 or "forced_bos_token_id" not in constraints else prompt_length + 1
    made = {
        "no_repeat_ngram_size": hf.NoRepeatNGramLogitsProcessor,
        "min_length": lambda length: hf.MinLengthLogitsProcessor(length, eos, where),
        "forced_bos_token_id": hf.ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda ids: hf.ForcedEOSTokenLogitsProcessor(prompt_length + max_new_tokens, ids, where),
        "remove_invalid_values": lambda _: hf.InfNanRemoveLogitsProcessor(),
        "exponential_decay_length_penalty": lambda pair: hf.ExponentialDecayLengthPenalty(pair, eos, prompt_length),
        "suppress_tokens": lambda ids: hf.SuppressTokensLogitsProcessor(ids, where),
        "begin_suppress_tokens": lambda ids: hf.SuppressTokensAtBeginLogitsProcessor(ids, first, where),
    }
    needs_eos = {"min_length", "exponential_decay_length_penalty"} if not eos else set()
    return [make(constraints[name]) for name, make in made.items() if name in constraints and name not in needs_eos]
