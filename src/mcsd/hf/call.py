"""One call of ``generate``: what transformers has prepared, as requests of an engine, and their results as its output.

The usual warpers become `mcsd.SamplingParams`. Any other processor or criterion is called as ``generate`` does, with
the padding of its row and a batch of as many rows; all rows of that batch are the one in question.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from mcsd.errors import InvalidParameter, McsdWarning
from mcsd.params import LogitsProcessor, SamplingParams
from mcsd.results import Completion

_WARPERS: dict[type, tuple[str, str]] = {
    hf.TemperatureLogitsWarper: ("temperature", "temperature"),
    hf.TopKLogitsWarper: ("top_k", "top_k"),
    hf.TopPLogitsWarper: ("top_p", "top_p"),
    hf.MinPLogitsWarper: ("min_p", "min_p"),
    hf.TypicalLogitsWarper: ("mass", "typical_p"),
}
"""Warpers that mcsd applies itself, in their order: the attribute of each, and the sampling parameter."""

_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
"""Processors that keep a state from call to call, so that they cannot be called for the nodes of a tree."""

_UNUSED = ("attention_mask", "position_ids", "use_cache", "cache_position", "logits_to_keep")
"""Arguments of the model that transformers always prepares, and that mcsd makes itself."""


class GenerateCall:
    """One call of ``generate``.

    Args:
        input_ids: int64 ``[B, n]``.
        processors, criteria, config: prepared by ``generate``.
        model_kwargs: arguments of the model, its attention mask among them.

    Attributes:
        prompts: the rows without their padding.

    Raises:
        InvalidParameter: something that cannot be kept exact, by its name.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: Sequence[LogitsProcessor],
        criteria: Sequence[Any],
        config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self._started = time.time()
        attention_mask = model_kwargs.get("attention_mask")
        _check_supported(config, processors, model_kwargs)
        self._input_ids = input_ids
        self._processors = processors
        self._criteria = criteria
        self._config = config
        lengths = (each.max_length for each in criteria if type(each) is hf.MaxLengthCriteria)
        self._max_length: int | None = min(lengths, default=None)
        self._padding = _padding_lengths(input_ids, attention_mask)
        _check_positions(model_kwargs.get("position_ids"), input_ids, self._padding)
        rows = input_ids.tolist()
        self.prompts: list[list[int]] = [row[start:] for row, start in zip(rows, self._padding, strict=True)]

    def params(self, vocab_size: int, stop: Any | None) -> list[SamplingParams]:
        """The sampling parameters of each row.

        Args:
            vocab_size: of the model. End tokens outside of it, which transformers allows, never occur.
            stop: a ``StopStringCriteria``, or None.
        """
        own, others = _native_fields(self._processors, self._config.do_sample, self._padding)
        ends = [each.eos_token_id.tolist() for each in self._criteria if type(each) is hf.EosTokenCriteria]
        criteria = [*map(self._from_now, self._criteria), *([] if stop is None else [stop])]
        criteria = [each for each in criteria if type(each) not in (hf.MaxLengthCriteria, hf.EosTokenCriteria)]
        if self._max_length is not None:
            own["max_new_tokens"] = max(1, self._max_length - self._input_ids.shape[1])
        rows = len(self.prompts)
        # `torch.manual_seed` makes the texts reproducible.
        seeds = torch.randint(2**63 - 1, (rows,)).tolist() if self._config.do_sample else [None] * rows
        common: dict[str, Any] = {
            **own,
            "stop_token_ids": [token for each in ends for token in each if 0 <= token < vocab_size],
            "ignore_eos": True,
        }
        made = []
        for row, seed in enumerate(seeds):
            in_batch = partial(
                _InBatch, row=row, rows=rows, padding=self._input_ids[row : row + 1, : self._padding[row]]
            )
            made.append(
                SamplingParams(
                    **common,
                    seed=seed,
                    logits_processors=[in_batch(_of_row(each, row, self._config)) for each in others],
                    stopping_criteria=[in_batch(each) for each in criteria],
                )
            )
        return made

    def _from_now(self, criterion: Any) -> Any:
        """A limit of time without the time that it took to make and calibrate the engine."""
        if type(criterion) is not hf.MaxTimeCriteria:
            return criterion
        started = criterion.initial_timestamp + time.time() - self._started
        return hf.MaxTimeCriteria(criterion.max_time, started)

    def output(self, model: Any, done: Sequence[Completion], max_length: int) -> Any:
        """The result of ``generate``: prompts and texts, with scores and logits if they were asked for.

        Args:
            model: the model.
            done: the completion of each row.
            max_length: of the engine; a text that ends there before its own limit is named in a warning.
        """
        config, pad = self._config, self._config._pad_token_tensor
        texts = [each.token_ids for each in done]
        if any(self._ends_early(prompt, each, max_length) for prompt, each in zip(self.prompts, done, strict=True)):
            warnings.warn(f"a text ends at the model's context of {max_length} tokens", McsdWarning, stacklevel=2)
        longest = max(map(len, texts))
        fill = 0 if pad is None else int(pad)
        new = torch.tensor([[*text, *[fill] * (longest - len(text))] for text in texts]).to(self._input_ids)
        sequences = torch.cat([self._input_ids, new], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        logits = scores = None
        if config.output_logits or config.output_scores:
            raw = self._logits(model, texts, longest)
            width = self._input_ids.shape[1]
            logits = raw if config.output_logits else None
            if config.output_scores:
                scores = tuple(
                    self._processors(sequences[:, : width + step], each.clone())  # type: ignore[operator]
                    for step, each in enumerate(raw)
                )
        return hf.generation.GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)

    def _ends_early(self, prompt: list[int], done: Completion, max_length: int) -> bool:
        """Whether a text has ended at the context rather than at the length that the call asks for."""
        length = len(prompt) + len(done.token_ids)
        at_context = done.finish_reason == "length" and length == max_length
        wanted = math.inf if self._max_length is None else self._max_length
        return at_context and self._input_ids.shape[1] + len(done.token_ids) < wanted

    def _logits(self, model: Any, texts: Sequence[Sequence[int]], longest: int) -> tuple[Tensor, ...]:
        """The model's logits ``[B, V]`` before each new token, in one forward a row; 0 after the end of a text."""
        rows = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            ids = torch.tensor([[*prompt, *text]], device=model.device)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1 + len(text)).logits
            # The logits after the last token belong to no token of the text.
            kept = logits[0, -1 - len(text) : -1].float()
            rows.append(torch.nn.functional.pad(kept, (0, 0, 0, longest - len(text))))
        return torch.stack(rows, dim=1).unbind()


@dataclass(frozen=True)
class _InBatch:
    """A processor or criterion for one row, called with as many rows as in ``generate``: all are this one.

    Attributes:
        function: of the whole batch.
        row, rows: which row, and of how many.
        padding: int64 ``[1, p]``, before its tokens.
    """

    function: Callable[[Tensor, Any], Any]
    row: int
    rows: int
    padding: Tensor

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        whole = torch.cat([self.padding, input_ids.to(self.padding.device)], dim=1).repeat(self.rows, 1)
        result = self.function(whole, None if scores is None else scores.repeat(self.rows, 1))
        of_batch = isinstance(result, Tensor) and result.dim()
        return result[self.row : self.row + 1] if of_batch else result


def _check_supported(config: Any, processors: Sequence[LogitsProcessor], model_kwargs: dict[str, Any]) -> None:
    """Check that a call can be kept exact.

    Raises:
        InvalidParameter: a decoding mode, an output, a processor or an argument of the model, by its name.
    """
    mode = config.get_generation_mode()
    if mode not in (hf.generation.GenerationMode.GREEDY_SEARCH, hf.generation.GenerationMode.SAMPLE):
        raise InvalidParameter(f"mcsd does not do {mode.value.replace('_', ' ')}", "sample, or decode greedily")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise InvalidParameter(f"{name} is not available: candidates are scored as a tree", "leave it out")
    for processor in processors:
        if type(processor).__name__ in _STATEFUL:
            raise InvalidParameter(
                f"{type(processor).__name__} keeps a state between tokens, and candidates are scored as a tree",
                "leave it out",
            )
    for name, value in model_kwargs.items():
        empty_cache = hasattr(value, "get_seq_length") and not value.get_seq_length()
        if name not in _UNUSED and value is not None and not empty_cache:
            raise InvalidParameter(f"mcsd does not pass {name} on to the model", "leave it out")


def _padding_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """How many tokens of each row are left padding.

    Raises:
        InvalidParameter: the mask hides other tokens.
    """
    if attention_mask is None:
        return [0] * len(input_ids)
    seen = attention_mask.bool()
    if seen.shape != input_ids.shape or bool((seen[:, :-1] & ~seen[:, 1:]).any()) or not bool(seen[:, -1].all()):
        raise InvalidParameter(
            "the attention mask hides tokens that are no left padding", "set padding_side='left' of the tokenizer"
        )
    lengths: list[int] = (~seen).sum(-1).tolist()
    return lengths


def _native_fields(
    processors: Sequence[LogitsProcessor], do_sample: bool, padding: list[int]
) -> tuple[dict[str, Any], list[LogitsProcessor]]:
    """Sampling parameters that do what the last warpers and a first repetition penalty do, and the other processors."""
    others: list[Any] = list(processors)
    fields: dict[str, Any] = {} if do_sample else {"temperature": 0}
    # Normalised logits have the same softmax.
    while others and type(others[-1]) is hf.LogitNormalization:
        others.pop()
    order = list(_WARPERS)
    after = len(order)
    while do_sample and others and type(others[-1]) in order[:after] and _is_plain(others[-1]):
        warper = others.pop()
        after = order.index(type(warper))
        attribute, name = _WARPERS[type(warper)]
        fields[name] = getattr(warper, attribute)
    if others and type(others[0]) is hf.RepetitionPenaltyLogitsProcessor:
        ignored = others[0].prompt_ignore_length
        counts_no_padding = isinstance(ignored, Tensor) and ignored.flatten().tolist() == padding
        if counts_no_padding or (ignored is None and not any(padding)):
            fields["repetition_penalty"] = others.pop(0).penalty
    return fields, others


def _is_plain(warper: Any) -> bool:
    """Whether a warper keeps one token at least, and gives the others no probability."""
    return getattr(warper, "min_tokens_to_keep", 1) == 1 and getattr(warper, "filter_value", -math.inf) == -math.inf


def _of_row(processor: Any, row: int, config: Any) -> Any:
    """A processor for one row: the function of allowed tokens sees no other prompt than the row's own."""
    if not isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
        return processor
    allowed, prompt = processor._prefix_allowed_tokens_fn, row // config.num_return_sequences
    return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(prompt, ids), 1)


def _check_positions(position_ids: Tensor | None, input_ids: Tensor, padding: list[int]) -> None:
    """Check that positions count the tokens after the padding.

    Raises:
        InvalidParameter: they are others.
    """
    if position_ids is None or position_ids.shape != input_ids.shape:
        return  # Positions of several axes are those that transformers prepares.
    start = torch.tensor(padding, device=input_ids.device)[:, None]
    counted = torch.arange(input_ids.shape[1], device=input_ids.device) - start
    if bool(((position_ids.to(counted.device) != counted) & (counted >= 0)).any()):
        raise InvalidParameter("mcsd does not use position_ids of your own", "leave them out")
