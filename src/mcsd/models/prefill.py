"""Prefill: reading a text into a cache in chunks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mcsd.models.layout import TokenLayout
from mcsd.models.protocol import Cache, LanguageModel, ModelOutput

_CHUNK, _CUDA_CHUNK = 256, 2048
"""Tokens of a forward at most: larger matrix products are compute-bound, and only take more memory."""

_MOST_LOGITS = 1 << 24
"""Logits of a forward at most, where a prefill computes them."""


def chunk_length(device: torch.device) -> int:
    """The most tokens that a forward of a prefill reads on a device."""
    return _CHUNK if device.type == "cpu" else _CUDA_CHUNK


def prefill(
    model: LanguageModel,
    cache: Cache,
    sequence: int,
    tokens: list[int],
    hidden_layers: Sequence[int] = (),
    take_logits: Callable[[int, Tensor], None] | None = None,
) -> Tensor | None:
    """Read and commit tokens of one sequence.

    Args:
        model, cache, sequence, tokens, hidden_layers: what reads, into which sequence of which cache, what, and which
            hidden states to return.
        take_logits: called with the place of a chunk in ``tokens`` and its logits ``[1, n, V]``, chunk by chunk.

    Returns:
        The requested hidden states ``[1, len(tokens), F]``; None if none were requested.
    """
    hidden = []
    sequences = slice(sequence, sequence + 1)
    most = chunk_length(model.device)
    if take_logits:
        most = max(1, min(most, _MOST_LOGITS // model.vocab_size))
    for start in range(0, len(tokens), most):
        chunk = torch.tensor([tokens[start : start + most]], device=model.device)
        length = chunk.shape[1]
        layout = TokenLayout.chain(length, model.device)
        output = model.forward(chunk, layout, cache, sequences, take_logits is not None, hidden_layers)
        if take_logits:
            take_logits(start, output.logits)
        count = torch.tensor([length], device=model.device)
        cache.commit(torch.arange(length, device=model.device)[None], count, sequences, [length])
        if output.hidden is not None:
            hidden.append(output.hidden)
    return torch.cat(hidden, dim=1) if hidden else None


@torch.no_grad()
def score_text(model: LanguageModel, tokens: list[int], hidden_layers: Sequence[int] = ()) -> ModelOutput:
    """Read a whole text in a new cache: logits ``[1, n, V]`` and the requested hidden states."""
    cache = model.new_cache(1, len(tokens))
    logits: list[Tensor] = []
    hidden = prefill(model, cache, cache.add(), tokens, hidden_layers, lambda _, chunk: logits.append(chunk))
    return ModelOutput(torch.cat(logits, dim=1), hidden)


@torch.no_grad()
def hidden_states(model: LanguageModel, tokens: Tensor, hidden_layers: Sequence[int]) -> Tensor:
    """The requested hidden states ``[B, T, F]``, in float32, of texts ``[B, T]`` that are padded on the right."""
    length = tokens.shape[1]
    layout = TokenLayout.chain(length, model.device)
    found = []
    # A forward returns the hidden states of all layers, so few texts at a time.
    for texts in torch.split(tokens.to(model.device), max(1, chunk_length(model.device) // length)):
        cache = model.new_cache(*texts.shape)
        for _ in texts:
            cache.add()
        output = model.forward(texts, layout, cache, logits=False, hidden_layers=hidden_layers)
        assert output.hidden is not None
        found.append(output.hidden.float())
    return torch.cat(found)
