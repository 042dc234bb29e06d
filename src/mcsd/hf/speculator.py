"""``model.generate(**inputs, custom_generate=speculative(draft))``: mcsd as a decoding method of transformers.

transformers prepares a call as it does for its own decoding. It does not hand ``streamer`` and ``tokenizer`` to a
decoding method of the user, and refuses ``stop_strings`` without a tokenizer. So they are given to `speculative`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
import transformers as hf
from torch import Tensor

from mcsd.config import EngineOptions, Tree
from mcsd.engine import Engine
from mcsd.errors import InvalidParameter
from mcsd.hf.call import GenerateCall
from mcsd.params import LogitsProcessor, SamplingParams, StoppingCriterion
from mcsd.planning import Profile
from mcsd.results import Completion


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
            "tokenizer": tokenizer,
            "draft_tokenizer": draft_tokenizer,
            # Weights may change between calls, as in training, and kept keys and values would not.
            "prefix_cache": 0,
        }
        self._streamer = streamer
        self._stop = stop
        self._last: tuple[Any, Engine | None] = (None, None, None), None

    def __repr__(self) -> str:
        return f"Speculator(draft={_name(self._draft)}, tree={self._options['tree']!r})"

    @property
    def engine(self) -> Engine | None:
        """The engine of the last call, with its statistics."""
        return self._last[1]

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
            model_kwargs: arguments of the model. None of them is a parameter here, because transformers takes what
                is out of the arguments of ``generate``.

        Returns:
            int64 ``[B, n + new]``, padded on the right; or a ``GenerateDecoderOnlyOutput``. A row that a stopping
            criterion has ended is padded, also where no end-of-sequence token is set: there ``generate`` goes on.

        Raises:
            InvalidParameter: something that cannot be kept exact, by its name.
            RequestError: a request failed.
        """
        streamer = self._streamer if streamer is None else streamer
        if streamer is not None and len(input_ids) > 1:
            raise InvalidParameter(f"a streamer takes one sequence, not {len(input_ids)}", "leave one of them out")
        with torch.inference_mode(False), torch.no_grad(), _evaluation_mode(model):
            call = GenerateCall(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            engine = self._engine_of(model)
            engine.calibrate()
            params = call.params(engine.target.vocab_size, self._stop_criterion(self._stop if stop is None else stop))
            if streamer is None:
                done = engine.generate(call.prompts, params)
            else:
                done = [_stream(engine, call.prompts[0], params[0], streamer, input_ids)]
            return call.output(model, done, engine.max_length)

    def _engine_of(self, model: Any) -> Engine:
        """The engine for a model; the last one, if it is the same model in the same place."""
        last, engine = self._last
        state = model, model.dtype, model.device
        if engine is None or last[0] is not model or last[1:] != state[1:]:
            profile = _ProfileMemory(model, self._draft)
            engine = Engine(model, self._draft, sampling_defaults="mcsd", profile=profile, **self._options)
            self._last = state, engine
        return engine

    def _stop_criterion(self, stop: str | Sequence[str]) -> Any | None:
        """Ends a text at a string, also at one that begins in the prompt, as ``stop_strings`` does."""
        if not stop:
            return None
        if self._options["tokenizer"] is None:
            raise InvalidParameter("stop strings need a tokenizer", "give speculative(draft, tokenizer=tokenizer)")
        return hf.StopStringCriteria(self._options["tokenizer"], [stop] if isinstance(stop, str) else list(stop))


def speculative(draft: Any = "ngram", **options: Any) -> Speculator:
    """A decoding method: ``model.generate(**inputs, custom_generate=mcsd.hf.speculative(draft))``.

    The result follows the distribution of ``model.generate(**inputs)`` with the same arguments. Keep the object for
    further calls: it loads its draft once.

    Args:
        draft, options: as in `Speculator`.
    """
    return Speculator(draft, **options)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _name(draft: Any) -> str:
    return repr(draft) if isinstance(draft, str | Path) else type(draft).__name__


class _ProfileMemory:
    """Calibrations of models, kept while they live, so that `speculative` may be written anew for every call."""

    _profiles: ClassVar[WeakKeyDictionary[Any, dict[tuple[Any, str], Profile]]] = WeakKeyDictionary()

    def __init__(self, model: Any, draft: Any) -> None:
        self._of_model = self._profiles.setdefault(model, {})
        self._draft = _identity(draft)

    def read(self, scheme: str) -> Profile | None:
        """See `mcsd.planning.ProfileStore`."""
        return self._of_model.get((self._draft, scheme))

    def try_write(self, scheme: str, profile: Profile) -> None:
        """See `mcsd.planning.ProfileStore`."""
        self._of_model[self._draft, scheme] = profile


def _identity(draft: Any) -> Any:
    """A key for a draft, or for several, which may be gone at the next call."""
    if isinstance(draft, list | tuple):
        return tuple(map(_identity, draft))
    return ref(draft) if hasattr(draft, "__weakref__") else str(draft)


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
