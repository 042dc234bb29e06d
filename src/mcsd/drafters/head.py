"""A draft head on the target's own hidden states: one small forward a level of the tree."""

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcsd.drafters.level import MAX_LAG, Level, LevelDrafter, PendingTokens
from mcsd.models import TokenLayout
from mcsd.models.prefill import chunk_length
from mcsd.models.prefix_cache import MAX_TEXTS, PrefixCache

if TYPE_CHECKING:
    from mcsd.models.bound_head import BoundHead
    from mcsd.models.kv_cache import KVCache


class HeadDrafter(LevelDrafter):
    """Drafts with a head.

    The head reads token t together with the target's hidden state at t-1. In a tree it reads its own hidden state
    instead. Those reads are not committed: accepted tokens are read again with the target's hidden states.

    Args:
        model: the head, bound to the target.
        max_batch, slots: size of the cache; slots must hold the longest sequence and a tree.
        max_texts: of its prefix cache.
    """

    cache: "KVCache"

    def __init__(self, model: "BoundHead", max_batch: int, slots: int, max_texts: int = MAX_TEXTS) -> None:
        super().__init__(model.device, model.vocabulary, len(model.vocabulary), model.captures)
        self.name = model.name
        self.hidden_layers = model.config.hidden_layers
        self.model = model
        self.cache = model.new_cache(max_batch, slots)
        self.prefixes = PrefixCache(self.cache, max_texts)
        self._prompts: list[tuple[tuple[int, ...], Tensor]] = []
        """For each sequence: its prompt, and the target's hidden state ``[1, F]`` before the last token of it."""
        self._kept_prompts: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        """The same for the latest texts: without it, an equal prompt would be read once more from there on."""
        self._target_hidden: list[list[Tensor]] = []
        """For each sequence, in pieces ``[c, F]``: the target's hidden states before each of its pending tokens."""
        self._own_hidden = torch.empty(0)
        """``[B, N, H]``: the head's own hidden states at the last level it read."""

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        index, reused = self.cache.add(), len(prompt) - 1 - (0 if hidden is None else hidden.shape[1])
        if not reused:
            # There is no hidden state before the first token.
            first = torch.zeros(1, self.model.config.num_features, dtype=self.model.dtype, device=self._device)
        elif hidden is None:
            first = self._kept_prompts[tuple(prompt)]
        else:
            first = hidden.new_empty(0, self.model.config.num_features)
        states = first if hidden is None else torch.cat([first, hidden[0]])
        if reused:
            self.prefixes.start(index, prompt[: len(prompt) - len(states)])
        self._target_hidden.append([states])
        self._prompts.append((tuple(prompt), states[-1:].clone()))

    def most_reused(self, prompt: list[int]) -> int:
        """See `Drafter.most_reused`: after the tokens that it has kept itself it needs all hidden states."""
        kept = self.prefixes.match(prompt[:-1])
        if kept == len(prompt) - 1 and tuple(prompt) in self._kept_prompts:
            return kept
        return max(0, kept - 1)

    def keep(self, sequence: int, token_ids: list[int]) -> None:
        """See `Drafter.keep`. What it has not read, it reads now: later there are no hidden states for it."""
        pending = token_ids[self.cache.host_lengths[sequence] :]
        if len(pending) > MAX_LAG:
            self._read(sequence, pending[:-1], torch.cat(self._target_hidden[sequence]))
        super().keep(sequence, token_ids)
        prompt, state = self._prompts[sequence]
        self._kept_prompts[prompt] = state
        self._kept_prompts.move_to_end(prompt)
        while len(self._kept_prompts) > self.prefixes.max_texts:
            self._kept_prompts.popitem(last=False)

    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        assert hidden is not None
        # The target's own token follows the root and the path: as many pending tokens as hidden states.
        for pieces, states, nodes in zip(self._target_hidden, hidden, paths, strict=True):
            pieces.append(states[: 1 + len(nodes)])

    def remove(self, sequence: int) -> None:
        """See `Drafter.remove`."""
        self.cache.remove(sequence)
        self._target_hidden[sequence], self._prompts[sequence] = self._target_hidden[-1], self._prompts[-1]
        self._target_hidden.pop()
        self._prompts.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self.cache.clear()
        self._target_hidden.clear()
        self._prompts.clear()

    def _prefill(self, sequence: int, tokens: list[int]) -> None:
        # There are hidden states of the tokens that were copied, too.
        self._read(sequence, tokens, torch.cat(self._target_hidden[sequence])[-len(tokens) - 1 :])

    def _read(self, sequence: int, tokens: list[int], states: Tensor) -> None:
        """Read and commit tokens with the target's hidden states before each of them, and before later ones."""
        sequences = slice(sequence, sequence + 1)
        most = chunk_length(self._device)
        for start in range(0, len(tokens), most):
            piece = torch.tensor([tokens[start : start + most]], device=self._device)
            length = piece.shape[1]
            before = states[None, start : start + length]
            layout = TokenLayout.chain(length, self._device)
            self.model.forward(piece, before, layout, self.cache, sequences, logits=False)
            keep = torch.arange(length, device=self._device)[None]
            self.cache.commit(keep, torch.tensor([length], device=self._device), sequences, [length])
        self._target_hidden[sequence] = [states[len(tokens) :].clone()]

    def _states_before(self, pending: PendingTokens) -> tuple[Tensor, ...]:
        # A sequence still has the hidden states of tokens that were copied in `catch_up`.
        pieces = zip(self._target_hidden, pending.host_counts, strict=True)
        states = [torch.cat(parts)[-count:] for parts, count in pieces]
        self._target_hidden = [[] for _ in states]
        padded = states[0][None] if len(states) == 1 else torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        missing = pending.tokens.shape[1] - padded.shape[1]
        return (torch.nn.functional.pad(padded, (0, 0, 0, missing)) if missing else padded,)

    def _root_logits(self, pending: PendingTokens, *states: Tensor) -> Tensor:
        layout = TokenLayout.chain(pending.tokens.shape[1], self._device)
        output = self.model.forward(pending.tokens, states[0], layout, self.cache)
        pending.commit(self.cache)
        assert output.hidden is not None
        self._own_hidden = pending.last(output.hidden)
        return pending.last(output.logits)

    def _level_logits(self, tokens: Tensor, level: Level) -> Tensor:
        assert level.layout is not None
        states = self._own_hidden[:, level.parent_index]
        output = self.model.forward(tokens, states, level.layout, self.cache, own=True)
        assert output.hidden is not None
        self._own_hidden = output.hidden
        return output.logits
