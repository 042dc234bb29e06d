"""The protocol of language models, target and draft alike. Independent of schemes and text.

A model is immutable weights; the tokens read so far live in a `Cache`, so one model serves several caches. A forward
appends *in-flight* tokens after the committed tokens of each sequence; `Cache.commit` keeps some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mcsd.models.layout import TokenLayout


@dataclass(frozen=True)
class ModelOutput:
    """The result of a forward.

    Attributes:
        logits: ``[B, n, V]``; of the last column only where logits were not asked for.
        hidden: ``[B, n, F]``, the requested hidden states, concatenated: layer 0 is the embeddings, i the output of
            layer i, and -1 the normalized output of the last layer, from which logits are computed.
    """

    logits: Tensor
    hidden: Tensor | None


class Cache:
    """The committed length of each sequence of a batch. Sequences 0 ... batch_size-1 are in use, without gaps.

    Subclasses keep the state of the model. `commit`, in one call or in two parts, is the only way a sequence grows.

    Args:
        max_batch: the most sequences in use at a time.
        device: of ``lengths``.

    Attributes:
        batch_size: sequences in use.
        lengths: int64 ``[max_batch]``, committed tokens; 0 for unused sequences.
        host_lengths: the same numbers on the host, which need not wait for the device to know them.
        generation: grows when the state moves to another place in memory: captured forwards know its address.
    """

    generation = 0

    def __init__(self, max_batch: int, device: torch.device) -> None:
        self.max_batch = max_batch
        self.batch_size = 0
        self.lengths = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.host_lengths = [0] * max_batch

    @property
    def bytes_per_token(self) -> int:
        """Cached bytes of one token, which every later forward reads."""
        return 0

    def add(self) -> int:
        """Start an empty sequence. Returns its index, the highest."""
        assert self.batch_size < self.max_batch, "no free sequence"
        self.batch_size += 1
        return self.batch_size - 1

    def copy(self, source: int, to: int, length: int | None = None) -> None:
        """Replace a sequence by the first ``length`` committed tokens of another; by default all of them."""
        length = self.host_lengths[source] if length is None else length
        self._copy(source, to, length)
        self.lengths[to] = self.host_lengths[to] = length

    def read(self, sequence: int, start: int, stop: int) -> tuple[Tensor, ...] | None:
        """A copy of the state of some committed tokens, for `write`; None: the cache makes none, or memory is short.

        Returns:
            Tensors ``[..., stop - start, size]``.
        """
        # A subclass has state that this method does not know.
        return () if type(self) is Cache else None

    def write(self, sequence: int, state: tuple[Tensor, ...], count: int) -> None:
        """Append the first ``count`` tokens of a state that `read` has returned, with the same tokens before them."""
        self._write(sequence, state, count)
        self.host_lengths[sequence] += count
        self.lengths[sequence] = self.host_lengths[sequence]

    def truncate(self, index: int, length: int) -> None:
        """Forget the committed tokens of a sequence after the first ``length``."""
        self.lengths[index] = self.host_lengths[index] = length

    def remove(self, index: int) -> None:
        """End a sequence. The last one takes its index."""
        last = self.batch_size - 1
        if index != last:
            self.copy(last, index)
        self.lengths[last] = self.host_lengths[last] = 0
        self.batch_size = last

    def clear(self) -> None:
        """End all sequences."""
        self.batch_size = 0
        self.lengths.zero_()
        self.host_lengths = [0] * self.max_batch

    def commit(
        self,
        columns: Tensor,
        counts: Tensor,
        sequences: slice = slice(None),
        host_counts: Sequence[int] | None = None,
    ) -> None:
        """Keep some in-flight tokens, in order, and drop the others.

        Args:
            columns: int64 ``[B, L]``, indices of in-flight tokens, ascending.
            counts: int64 ``[B]``, how many of them each sequence keeps.
            sequences: the B sequences; all in use by default.
            host_counts: ``counts``, if the host knows them; else they are read from the device.
        """
        self.keep(columns, counts, sequences)
        self.advance(counts.tolist() if host_counts is None else host_counts, sequences)

    def keep(self, columns: Tensor, counts: Tensor, sequences: slice = slice(None)) -> None:
        """The part of `commit` on the device, which may be captured in a graph. The host's part is `advance`."""
        sequences = slice(*sequences.indices(self.batch_size))
        self._keep(columns, counts, sequences)
        self.lengths[sequences].add_(counts)

    def advance(self, host_counts: Sequence[int], sequences: slice = slice(None)) -> None:
        """The part of `commit` on the host."""
        for index, count in enumerate(host_counts, slice(*sequences.indices(self.batch_size)).start):
            self.host_lengths[index] += count

    def reserve(self, tokens: int) -> int:
        """Make space for so many in-flight tokens of every sequence. Returns how many of its slots a forward reads."""
        return 0

    def _copy(self, source: int, to: int, length: int) -> None:
        """Subclass hook: copy the state of the first ``length`` committed tokens of a sequence."""

    def _write(self, sequence: int, state: tuple[Tensor, ...], count: int) -> None:
        """Subclass hook: write the state of ``count`` tokens behind the committed state."""

    def _keep(self, columns: Tensor, counts: Tensor, sequences: slice) -> None:
        """Subclass hook: move the state of kept in-flight tokens behind the committed state."""


@runtime_checkable
class LanguageModel(Protocol):
    """Anything that predicts the next token.

    Attributes:
        vocab_size: logits per position.
        max_length: the context length; None: unlimited.
        device: of inputs and outputs.
        eos_token_ids: tokens that end a text.
        name: shown to users.
    """

    vocab_size: int
    max_length: int | None
    device: torch.device
    eos_token_ids: frozenset[int]
    name: str

    def new_cache(self, max_batch: int, max_tokens: int) -> Cache:
        """An empty cache for ``max_batch`` sequences of ``max_tokens`` tokens each, in-flight tokens included."""
        ...

    def forward(
        self,
        tokens: Tensor,
        layout: TokenLayout,
        cache: Cache,
        sequences: slice = slice(None),
        logits: bool = True,
        hidden_layers: Sequence[int] = (),
    ) -> ModelOutput:
        """Read in-flight tokens.

        Args:
            tokens: int64 ``[B, n]``, right-padded. Padding never changes the results of a sequence's own tokens.
            layout: of the new tokens among all in-flight tokens.
            cache: made by this model.
            sequences: the B sequences; all in use by default.
            logits: whether to compute the logits of every column.
            hidden_layers: layers whose hidden states to return, see `ModelOutput`.
        """
        ...


@runtime_checkable
class DecoderModel(LanguageModel, Protocol):
    """A language model whose embeddings, hidden states and output matrix a draft head can read.

    Attributes:
        num_layers: decoder layers.
        vocabulary: int64 ``[K]``, the token of each logit, if the output matrix was cut to a draft vocabulary.
        precision: weight format and kernels, for people.
        config: sizes of the decoder, as the configurations of transformers' text models name them.
        generation_config: sampling parameters that the model recommends; see `mcsd.generation_config`.
    """

    config: Any
    num_layers: int
    vocabulary: Tensor | None
    precision: str
    generation_config: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        ...

    @property
    def embed_tokens(self) -> nn.Module:
        """Token ids to embeddings ``[..., H]``."""
        ...

    @property
    def lm_head(self) -> nn.Module:
        """The last hidden states to logits."""
        ...

    @property
    def weights(self) -> nn.Module:
        """The modules with the weights that a forward reads; the network itself for a model of transformers."""
        ...
