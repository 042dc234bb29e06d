"""One timed run of a batch of texts: by an engine of mcsd, or by ``generate`` of transformers."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import mcsd
from gpu.session import Session
from gpu.synthetic_pair import Pair
from gpu.tiny_models import random_texts

PROMPT_TOKENS = 64

ASSISTANT_TOKENS = 4
"""Tokens that an assistant proposes: as many as the engine's ``chain:4``."""


@dataclass(frozen=True)
class Workload:
    """What every system does.

    Attributes:
        vocabulary: tokens of the models.
        batch: texts that run together.
        temperature: of sampling from the whole distribution.
        new_tokens: of each text.
    """

    vocabulary: int
    batch: int
    temperature: float
    new_tokens: int

    def __str__(self) -> str:
        return f"T={self.temperature:g}, batch {self.batch}"

    @property
    def max_length(self) -> int:
        """Tokens of a text with its prompt."""
        return PROMPT_TOKENS + self.new_tokens

    def prompts(self, seed: int) -> list[list[int]]:
        """Prompts of equal lengths, others for each seed."""
        return random_texts([PROMPT_TOKENS] * self.batch, self.vocabulary, seed)


@dataclass(frozen=True)
class Measurement:
    """Sums over one run or several.

    Attributes:
        tokens: new tokens.
        seconds: wall time, prefill included.
        target_calls: forwards of the target that gave a text's tokens, summed over texts.
        steps: steps that were timed, at least 1.
        step_seconds: wall time of these steps, for mcsd without prefill.
        draft_calls: forwards of the draft in these steps.
        cached_tokens: tokens in the cache that these steps read, summed over texts and steps.
        parts: seconds of these steps by part, by the engine's own timers.
    """

    tokens: int
    seconds: float
    target_calls: int
    steps: int
    step_seconds: float
    draft_calls: int
    cached_tokens: int
    parts: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "Measurement") -> "Measurement":
        parts = {name: value + other.parts.get(name, 0.0) for name, value in self.parts.items()}
        numbers = {name: value + vars(other)[name] for name, value in vars(self).items() if name != "parts"}
        return Measurement(**numbers, parts=parts)


Runner = Callable[[int], Measurement]
"""Runs the workload once with a seed."""


def engine_requests(engine: mcsd.Engine, work: Workload, seed: int) -> list[Any]:
    """The texts as submitted requests, each with a seed of its own."""
    params = [
        mcsd.SamplingParams(
            temperature=work.temperature, max_new_tokens=work.new_tokens, seed=1000 * seed + i, ignore_eos=True
        )
        for i in range(work.batch)
    ]
    requests = [engine.request(prompt, one) for prompt, one in zip(work.prompts(seed), params, strict=True)]
    for request in requests:
        engine.submit(request)
    return requests


def engine_runner(session: Session, engine: mcsd.Engine, work: Workload) -> Runner:
    """Steps an engine until all texts are complete. The first step, with the prefill, is no timed step."""

    def run(seed: int) -> Measurement:
        session.synchronize()
        start = time.perf_counter()
        requests = engine_requests(engine, work, seed)
        engine.step()
        session.synchronize()
        first = time.perf_counter()
        parts, levels, steps, cached = engine.seconds, engine.draft_levels, 0, 0
        while running := [request for request in requests if not request.done]:
            cached += sum(len(request.all_tokens) for request in running)
            steps += 1
            engine.step()
        session.synchronize()
        end = time.perf_counter()
        if not steps:  # All texts were complete after the first step.
            steps, first = 1, start
        stats = [request.completion.stats for request in requests]
        return Measurement(
            tokens=sum(one.new_tokens for one in stats),
            seconds=end - start,
            target_calls=sum(one.target_calls for one in stats),
            steps=steps,
            step_seconds=end - first,
            draft_calls=engine.draft_levels - levels,
            cached_tokens=cached,
            parts={name: seconds - parts[name] for name, seconds in engine.seconds.items()},
        )

    return run


class CallCounter:
    """Counts the forwards of a model while it is entered."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.calls = 0

    def __enter__(self) -> "CallCounter":
        self._handle = self._model.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _count(self, *arguments: object) -> None:
        self.calls += 1


def generate_runner(session: Session, pair: Pair, work: Workload, assisted: bool = False, **options: Any) -> Runner:
    """Runs ``generate`` of transformers with the same sampling; prefill counts as a step.

    Args:
        session: of the run.
        pair: target, and the draft as assistant.
        work: what to generate.
        assisted: whether the draft assists, with `ASSISTANT_TOKENS` tokens a step.
        options: further arguments of ``generate``.
    """
    options |= {"do_sample": False}
    if work.temperature:
        options |= {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}
    if assisted:
        config = pair.draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = ASSISTANT_TOKENS, "constant"
        config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = pair.draft
    counted: dict[int, tuple[int, int]] = {}

    def generate(seed: int) -> Tensor:
        torch.manual_seed(seed)
        ids = torch.tensor(work.prompts(seed), device=session.device)
        output: Tensor = pair.target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new_tokens, pad_token_id=0, **options
        )
        return output

    def run(seed: int) -> Measurement:
        if assisted and seed not in counted:
            # Only the first run of a seed, which warms up, has the hooks.
            with CallCounter(pair.target) as target, CallCounter(pair.draft) as draft:
                generate(seed)
            counted[seed] = target.calls, draft.calls
        session.synchronize()
        start = time.perf_counter()
        output = generate(seed)
        session.synchronize()
        seconds = time.perf_counter() - start
        texts, new = work.batch, output.shape[1] - PROMPT_TOKENS
        steps, draft_calls = counted.get(seed, (new, 0))
        cached = round(texts * steps * (PROMPT_TOKENS + new / 2))
        return Measurement(texts * new, seconds, texts * steps, steps, seconds, draft_calls, cached)

    return run


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a forward of a few tokens reads: all but the embeddings."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values of one token of a `synthetic_pair` model."""
    config = model.config
    return int(2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize)
