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
    scheme: str,
) -> dict[int, StepTrace]:
    """The traces of some sequences, before their verification, with an empty path.

    Args:
        tree, logits, sampling, history: as in `mcsd.schemes.base.Scheme.verify`.
        sequences: indices in the batch.
        scheme: the name of the scheme of the step.
    """
    if not sequences:
        return {}
    if sampling.any_processors and logits.device.type != "cpu":
        tree, logits, sampling, history = (on_host(each) for each in (tree, logits, sampling, history))
    rows = torch.tensor(sequences, device=logits.device)
    p, top, values = _target(TargetDistributions(tree, logits, sampling, history), rows)
    best = torch.cat([top.double(), values, _draft_at(tree, sampling, rows, top)], dim=2)
    table = [tree.tokens[rows].double(), tree.valid[rows].double(), p, _draft(tree, sampling, rows), best]
    # One read from the device. Token ids are exact in float64.
    read = torch.cat([part.flatten(1) for part in table], dim=1).tolist()
    is_drawn = [tree.q is not None and sampling.params[sequence].temperature > 0 for sequence in sequences]
    return {
        sequence: _step_trace(tree.shape.parents, row, scheme if drawn else "top-k")
        for sequence, row, drawn in zip(sequences, read, is_drawn, strict=True)
    }


def _target(target: TargetDistributions, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p of each candidate, float64 ``[A, n]``; the tokens of `StepTrace.top` and their p, ``[A, 1 + n, k]``."""
    tokens, shape, device = target.tree.tokens, target.tree.shape, rows.device
    # On a GPU they are computed for the whole batch only.
    sequences = rows if device.type == "cpu" else torch.arange(len(tokens), device=device)
    among = torch.arange(len(rows)) if device.type == "cpu" else rows
    p = torch.zeros(len(rows), len(shape), dtype=torch.float64, device=device)
    top, values = [], []
    for column, children in enumerate(shape.children.tolist()):
        path = paths_of(shape, device)[column].expand(len(sequences), -1)
        after, _ = target.after(torch.full_like(sequences, column), path, sequences if device.type == "cpu" else None)
        after = after[among].double()
        nodes = [child for child in children if child >= 0]
        p[:, nodes] = after.gather(1, tokens[rows][:, nodes])
        best = after.topk(min(TOP, after.shape[1]))
        top.append(best.indices)
        values.append(best.values)
    return p, torch.stack(top, dim=1), torch.stack(values, dim=1)


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


def _draft_at(tree: CandidateTree, sampling: BatchSamplingParams, rows: Tensor, tokens: Tensor) -> Tensor:
    """float64: q of ``tokens [A, 1 + n, k]`` after each node, NaN where nothing was drawn from it."""
    if tree.q is None:
        return torch.full(tokens.shape, nan, dtype=torch.float64, device=rows.device)
    support, weights = tree.q.support[rows], tree.q.weights[rows].double()
    q = (weights[:, :, None] * (support[:, :, None] == tokens[..., None])).sum(-1)
    drawn = (weights.sum(-1) > 0) & ~sampling.greedy[rows][:, None]
    return torch.where(drawn[..., None], q, nan)


def _step_trace(parents: tuple[int, ...], row: list[float], scheme: str) -> StepTrace:
    count = len(parents)
    tokens, valid, p, q = (row[part * count : (part + 1) * count] for part in range(4))
    size = (len(row) - 4 * count) // (1 + count)
    nodes = [row[4 * count + node * size : 4 * count + (node + 1) * size] for node in range(1 + count)]
    # The most probable tokens of each node, with p and q.
    tops = [
        list(zip(*(node[part * size // 3 : (part + 1) * size // 3] for part in range(3)), strict=True))
        for node in nodes
    ]
    return StepTrace(
        parents=parents,
        token_ids=tuple(int(token) if there else None for token, there in zip(tokens, valid, strict=True)),
        pieces=(),
        q=tuple(_number(value, there) for value, there in zip(q, valid, strict=True)),
        p=tuple(_number(value, there) for value, there in zip(p, valid, strict=True)),
        top=tuple(tuple((int(token), value) for token, value, _ in top if value > 0) for top in tops),
        top_q=tuple(tuple(_number(q, True) for _, value, q in top if value > 0) for top in tops),
        path=(),
        token_id=None,
        scheme=scheme,
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
