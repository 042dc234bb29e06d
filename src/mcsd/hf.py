"""mcsd inside ``model.generate`` of transformers: ``model.generate(**inputs, custom_generate=speculative(draft))``.

transformers prepares a call as it does for its own decoding: generation config, logits processors, stopping criteria.
This module reads what it has prepared. The usual warpers become `mcsd.SamplingParams`. Any other processor is called
with the tokens before each node, padding included, as ``generate`` calls it.

transformers does not hand ``streamer`` and ``tokenizer`` to a decoding method of the user, and refuses ``stop_strings``
without a tokenizer. So they are given to `speculative`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
import transformers as hf
from torch import Tensor

from mcsd.config import EngineOptions, Tree
from mcsd.engine import Engine
from mcsd.errors import InvalidParameter
from mcsd.params import LogitsProcessor, SamplingParams, StoppingCriterion
from mcsd.planning import Profile
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

_UNUSED = ("position_ids", "use_cache", "cache_position", "logits_to_keep")
"""Arguments of the model that transformers always prepares, and that mcsd makes itself."""


class Speculator:
    """A decoding method for ``model.generate(..., custom_generate=speculator)``.

    It keeps its draft, caches and calibration for further calls with the same model. A streamer or stop strings for a
    single call: ``functools.partial(speculator, streamer=streamer)``.

    Args:
        draft: a model of transformers, the name or folder of a model or draft head, "ngram", or any other draft that
            `mcsd.Engine` takes.
        tree, scheme, max_batch, optimize: as in `mcsd.Engine`.
        tokenizer: of the model; for stop strings.
        draft_tokenizer: of a draft given as an object, as in `mcsd.Engine`.
        streamer: receives the prompt and each token, as from ``generate``; for a single sequence.
        stop: strings that end a text; their tokens are part of the result, as with ``stop_strings``.
    """

    def __init__(
        self,
        draft: Any = "ngram",
        *,
        tree: Tree = EngineOptions.tree,
        scheme: str = EngineOptions.scheme,
        tokenizer: Any | None = None,
        streamer: Any | None = None,
        stop: str | Sequence[str] = (),
        max_batch: int = EngineOptions.max_batch,
        optimize: bool = False,
        draft_tokenizer: Any | None = None,
    ) -> None:
        self._draft = draft
        self._options: dict[str, Any] = {
            "tree": tree,
            "scheme": scheme,
            "max_batch": max_batch,
            "optimize": optimize,
            "draft_tokenizer": draft_tokenizer,
        }
        self._tokenizer = tokenizer
        self._streamer = streamer
        self._stop = stop
        self.engine: Engine | None = None
        """The engine of the last call, with its statistics."""
        self._model: Any = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriterion],
        generation_config: Any,
        streamer: Any | None = None,
        stop: str | Sequence[str] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Generate, as ``generate`` calls a decoding method.

        Args:
            model, input_ids, logits_processor, stopping_criteria, generation_config: prepared by ``generate``.
            streamer, stop: instead of those of the object; ``stop`` may be an argument of ``generate``.
            model_kwargs: arguments of the model, the attention mask among them. Those that are parameters here would
                be taken out of the arguments of ``generate``.

        Returns:
            int64 ``[B, n + new]``, padded on the right; or a ``GenerateDecoderOnlyOutput``. A row that a stopping
            criterion has ended is padded, also where no end-of-sequence token is set: there ``generate`` goes on.

        Raises:
            InvalidParameter: something that cannot be kept exact, by its name.
            RequestError: a request failed.
        """
        attention_mask = model_kwargs.pop("attention_mask", None)
        _check_supported(generation_config, logits_processor, model_kwargs)
        streamer = self._streamer if streamer is None else streamer
        if streamer is not None and len(input_ids) > 1:
            raise InvalidParameter(f"a streamer takes one sequence, not {len(input_ids)}", "leave one of them out")
        call = _Call(input_ids, attention_mask, logits_processor, stopping_criteria, generation_config)
        params = call.params(self._stop if stop is None else stop)
        engine = self._engine_of(model)
        if streamer is None:
            done = engine.generate(call.prompts, params)
        else:
            done = [_stream(engine, call.prompts[0], params[0], streamer, input_ids)]
        return call.output(model, [each.token_ids for each in done])

    def _engine_of(self, model: Any) -> Engine:
        """The engine for a model; the last one, if it is the same model."""
        if self.engine is None or self._model is not model:
            profile = _ProfileMemory(model, self._draft)
            self.engine = Engine(
                model, self._draft, self._tokenizer, sampling_defaults="mcsd", profile=profile, **self._options
            )
            self._model = model
        return self.engine


def speculative(draft: Any = "ngram", **options: Any) -> Speculator:
    """A decoding method: ``model.generate(**inputs, custom_generate=mcsd.hf.speculative(draft))``.

    The result follows the distribution of ``model.generate(**inputs)`` with the same arguments. Keep the object for
    further calls: it loads its draft once.

    Args:
        draft, options: as in `Speculator`.
    """
    return Speculator(draft, **options)


class _Call:
    """One call of ``generate``: its rows as requests, and their results as its output."""

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        processors: Sequence[LogitsProcessor],
        criteria: Sequence[StoppingCriterion],
        config: Any,
    ) -> None:
        self._input_ids = input_ids
        self._processors = processors
        self._criteria = criteria
        self._config = config
        self._padding = _padding_lengths(input_ids, attention_mask)
        rows = input_ids.tolist()
        self.prompts: list[list[int]] = [row[start:] for row, start in zip(rows, self._padding, strict=True)]

    def params(self, stop: str | Sequence[str]) -> list[SamplingParams]:
        """The sampling parameters of each row."""
        own, others = _native_fields(self._processors, self._config.do_sample, self._padding)
        lengths = [each.max_length for each in self._criteria if isinstance(each, hf.MaxLengthCriteria)]
        ends = [each.eos_token_id.tolist() for each in self._criteria if isinstance(each, hf.EosTokenCriteria)]
        criteria = [
            each for each in self._criteria if not isinstance(each, (hf.MaxLengthCriteria, hf.EosTokenCriteria))
        ]
        if lengths:
            own["max_new_tokens"] = min(lengths) - self._input_ids.shape[1]
        rows = len(self.prompts)
        # `torch.manual_seed` makes the texts reproducible.
        seeds = torch.randint(2**63 - 1, (rows,)).tolist() if self._config.do_sample else [None] * rows
        made = []
        for row, start in enumerate(self._padding):
            padding = self._input_ids[row : row + 1, :start]
            made.append(
                SamplingParams(
                    **own,
                    seed=seeds[row],
                    stop=stop,
                    stop_token_ids=[token for each in ends for token in each],
                    ignore_eos=True,
                    logits_processors=[_Padded(_of_row(each, row, self._config), padding) for each in others],
                    stopping_criteria=[_Padded(each, padding) for each in criteria],
                )
            )
        return made

    def output(self, model: Any, texts: Sequence[Sequence[int]]) -> Any:
        """The result of ``generate``: prompts and texts, with scores and logits if they were asked for."""
        config, pad = self._config, self._config._pad_token_tensor
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
class _Padded:
    """A processor or criterion, called with the padding of its row before the tokens, as ``generate`` calls it."""

    function: Callable[[Tensor, Any], Any]
    padding: Tensor

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.function(torch.cat([self.padding, input_ids.to(self.padding.device)], dim=1), scores)


class _ProfileMemory:
    """Calibrations of models, kept while they live, so that `speculative` may be written anew for every call."""

    _profiles: ClassVar[WeakKeyDictionary[Any, dict[tuple[Any, str], Profile]]] = WeakKeyDictionary()

    def __init__(self, model: Any, draft: Any) -> None:
        self._of_model = self._profiles.setdefault(model, {})
        # A name, or an object that may be gone at the next call.
        self._draft = draft if isinstance(draft, str | Path) or draft is None else ref(draft)

    def read(self, scheme: str) -> Profile | None:
        """See `mcsd.planning.ProfileStore`."""
        return self._of_model.get((self._draft, scheme))

    def try_write(self, scheme: str, profile: Profile) -> None:
        """See `mcsd.planning.ProfileStore`."""
        self._of_model[self._draft, scheme] = profile


def _stream(engine: Engine, prompt: list[int], params: SamplingParams, streamer: Any, input_ids: Tensor) -> Completion:
    """Generate one text, and hand its tokens to a streamer as ``generate`` does."""
    streamer.put(input_ids.cpu())
    done: Completion | None = None
    for chunk in engine.stream(prompt, params):
        for token in chunk.token_ids:
            streamer.put(torch.tensor([token]))
        done = chunk.completion
    streamer.end()
    assert done is not None
    return done


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
        if ignored is None or (isinstance(ignored, Tensor) and ignored.flatten().tolist() == padding):
            fields["repetition_penalty"] = others.pop(0).penalty
    return fields, others


def _is_plain(warper: Any) -> bool:
    """Whether a warper keeps one token at least, and gives the others no probability."""
    return getattr(warper, "min_tokens_to_keep", 1) == 1 and getattr(warper, "filter_value", -math.inf) == -math.inf


def _of_row(processor: Any, row: int, config: Any) -> Any:
    """A processor for one row: those of transformers that know the rows of the batch see this row only."""
    if isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
        allowed, prompt = processor._prefix_allowed_tokens_fn, row // config.num_return_sequences
        return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(prompt, ids), 1)
    own = copy.copy(processor)
    if isinstance(own, hf.EncoderNoRepeatNGramLogitsProcessor):
        own.batch_size, own.generated_ngrams = 1, processor.generated_ngrams[row : row + 1]
    for name in ("encoder_input_ids", "prompt_ignore_length"):
        value = getattr(processor, name, None)
        if isinstance(value, Tensor) and value.dim() and len(value) > row:
            setattr(own, name, value[row : row + 1])
    return own
