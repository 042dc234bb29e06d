"""Traces of steps: p and q of every candidate, computed once more. Slow, and only for requests that ask for it."""

from collections.abc import Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from mcsd.graphs import on_host
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, TokenHistory
from mcsd.schemes.types import TargetDistributions, paths_of
from mcsd.step_trace import StepTrace

TOP = 5
"""Most probable tokens of the target that a trace lists at each node."""


def trace_trees(
    tree: CandidateTree,
    logits: Tensor,
    sampling: BatchSamplingParams,
    history: TokenHistory,
    sequences: Sequence[int],
) -> dict[int, StepTrace]:
    """The traces of some sequences, before their verification, with an empty path.

    Args:
        tree, logits, sampling, history: as in `mcsd.schemes.base.Scheme.verify`.
        sequences: indices in the batch.
    """
    if not sequences:
        return {}
    if sampling.any_processors and logits.device.type != "cpu":
        tree, logits, sampling, history = (on_host(each) for each in (tree, logits, sampling, history))
    rows = torch.tensor(sequences, device=logits.device)
    p, top = _target(TargetDistributions(tree, logits, sampling, history), rows)
    table = [tree.tokens[rows].double(), tree.valid[rows].double(), p, _draft(tree, sampling, rows), top]
    # One read from the device. Token ids are exact in float64.
    read = torch.cat([part.flatten(1) for part in table], dim=1).tolist()
    return {sequence: _step_trace(tree.shape.parents, row) for sequence, row in zip(sequences, read, strict=True)}


def _target(target: TargetDistributions, rows: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``[A, n]``: p of each candidate after its parent; ``[A, 1 + n, 2 · TOP]``: `StepTrace.top`."""
    tokens, shape, device = target.tree.tokens, target.tree.shape, rows.device
    # On a GPU they are computed for the whole batch only.
    sequences = rows if device.type == "cpu" else torch.arange(len(tokens), device=device)
    among = torch.arange(len(rows)) if device.type == "cpu" else rows
    p = torch.zeros(len(rows), len(shape), dtype=torch.float64, device=device)
    top = []
    for column, children in enumerate(shape.children.tolist()):
        path = paths_of(shape, device)[column].expand(len(sequences), -1)
        after, _ = target.after(torch.full_like(sequences, column), path, sequences if device.type == "cpu" else None)
        after = after[among].double()
        nodes = [child for child in children if child >= 0]
        p[:, nodes] = after.gather(1, tokens[rows][:, nodes])
        best = after.topk(min(TOP, after.shape[1]))
        top.append(torch.cat([best.indices.double(), best.values], dim=1))
    return p, torch.stack(top, dim=1)


def _draft(tree: CandidateTree, sampling: BatchSamplingParams, rows: Tensor) -> Tensor:
    """float64 ``[A, n]``: q of each candidate after its parent, NaN where it was not drawn from one."""
    tokens = tree.tokens[rows]
    if tree.q is None:
        return torch.full(tokens.shape, nan, dtype=torch.float64, device=rows.device)
    parents = torch.tensor(tree.shape.parents, dtype=torch.int64, device=rows.device) + 1
    choice = tree.choice[rows][..., None]
    support, weights = (part[rows][:, parents].gather(2, choice)[..., 0] for part in (tree.q.support, tree.q.weights))
    # A looked-up token has no choice, and q does not draw it.
    drawn = (support == tokens) & (weights > 0) & ~sampling.greedy[rows][:, None]
    return torch.where(drawn, weights.double(), nan)


def _step_trace(parents: tuple[int, ...], row: list[float]) -> StepTrace:
    count = len(parents)
    tokens, valid, p, q = (row[part * count : (part + 1) * count] for part in range(4))
    size = (len(row) - 4 * count) // (1 + count)
    tops = [row[4 * count + node * size : 4 * count + (node + 1) * size] for node in range(1 + count)]
    return StepTrace(
        parents=parents,
        token_ids=tuple(int(token) if there else None for token, there in zip(tokens, valid, strict=True)),
        pieces=(),
        q=tuple(_number(value, there) for value, there in zip(q, valid, strict=True)),
        p=tuple(_number(value, there) for value, there in zip(p, valid, strict=True)),
        top=tuple(
            tuple(
                (int(token), value)
                for token, value in zip(top[: size // 2], top[size // 2 :], strict=True)
                if value > 0
            )
            for top in tops
        ),
        path=(),
        token_id=None,
    )


def _number(value: float, there: float) -> float | None:
    return value if there and not isnan(value) else None


def with_path(trace: StepTrace, root: int, path: Sequence[int], tokens: Sequence[int], tokenizer: Any) -> StepTrace:
    """The trace of a verified step.

    Args:
        trace: from `trace_trees`.
        root: the last token before the step.
        path, tokens: as in `mcsd.schemes.VerifiedSequence`.
        tokenizer: of the target, or None.
    """
    token = tokens[-1] if len(tokens) > len(path) else None
    trace = replace(trace, path=tuple(path), token_id=token)
    if tokenizer is None:
        return trace
    before = [root if parent < 0 else trace.token_ids[parent] for parent in trace.parents]
    pieces = tuple(_piece(tokenizer, *pair) for pair in zip(before, trace.token_ids, strict=True))
    last = trace.token_ids[path[-1]] if path else root
    return replace(trace, pieces=pieces, piece=_piece(tokenizer, last, token))


def _piece(tokenizer: Any, before: int | None, token: int | None) -> str:
    """The text that a token adds after another one, special tokens included."""
    if before is None or token is None:
        return ""
    old, new = (str(tokenizer.decode(ids, skip_special_tokens=False)) for ids in ([before], [before, token]))
    return new[len(old) :]
