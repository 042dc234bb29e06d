"""The distribution of every scheme, by chi-square on which token followed which.

Target and draft are tables (`mcsd.testing.TabularModel`) on the device, so the exact distribution is known. A correct
engine fails one run in a thousand at most: a check fails if its p-value is below 10⁻³ divided by the number of checks.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

import mcsd
from gpu.engines import make_engine
from gpu.session import Session
from mcsd.schemes.registry import supports
from mcsd.testing import TabularModel

FALSE_ALARM = 1e-3
"""Odds that a correct engine fails any check of a run."""

_NEW_TOKENS = 30
_SETTINGS = (
    mcsd.SamplingParams(max_new_tokens=_NEW_TOKENS),
    mcsd.SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=1.4, top_k=3),
    mcsd.SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0.7, top_p=0.9),
)
_VOCABULARY = 6
_LEAST_EXPECTED = 5


def check_distributions(session: Session) -> None:
    """Every scheme; in a short run the default scheme only."""
    schemes = ("mcss-wor",) if session.is_short else tuple(mcsd.SCHEMES)
    level = FALSE_ALARM / (len(schemes) * len(_SETTINGS))
    texts = 200 if session.tiny else 1000
    target, draft = (random_table(seed) for seed in (1, 2))
    target_model, draft_model = (TabularModel(table.float().to(session.device)) for table in (target, draft))
    # On a card, the first use of a shape runs eagerly and later ones as CUDA graphs, as with `optimize=True`.
    target_model.captures = draft_model.captures = True
    for scheme in schemes:
        tree = "2x2" if supports(scheme, mcsd.TreeShape.parse("2x2")) else "chain:3"
        engine = make_engine(target_model, draft_model, tree, len(_SETTINGS) * texts, _NEW_TOKENS + 8, scheme=scheme)
        params = [replace(setting, seed=i) for i in range(texts) for setting in _SETTINGS]
        done = engine.generate([[0]] * len(params), params)
        values = [
            p_value(_transitions(done[i :: len(_SETTINGS)]), warped(target, setting))
            for i, setting in enumerate(_SETTINGS)
        ]
        session.results.setdefault("distribution", {})[scheme] = {"tree": tree, "p-values": values}
        detail = f"tree {tree}, p-values {' '.join(f'{value:.3f}' for value in values)}, level {level:.1e}"
        session.check(scheme, min(values) > level, detail)


def random_table(seed: int) -> Tensor:
    """float64 ``[V, V]``: the probability of each next token; after token 2, half of the tokens are impossible."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(_VOCABULARY, _VOCABULARY, generator=generator, dtype=torch.float64) ** 2 + 0.02
    table[2, : _VOCABULARY // 2] = 0.0
    return table / table.sum(-1, keepdim=True)


def warped(table: Tensor, params: mcsd.SamplingParams) -> Tensor:
    """A table after temperature, top-k and top-p, by transformers' warpers."""
    scores = table.log() / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)


def _transitions(completions: list[mcsd.Completion]) -> Tensor:
    """float64 ``[V, V]``: how often each token followed each. Every text starts after token 0."""
    tokens = torch.tensor([[0, *done.token_ids] for done in completions])
    pairs = tokens[:, :-1] * _VOCABULARY + tokens[:, 1:]
    counts = torch.bincount(pairs.flatten(), minlength=_VOCABULARY**2)
    return counts.view(_VOCABULARY, _VOCABULARY).double()


def p_value(counts: Tensor, table: Tensor) -> float:
    """The chi-square test of counted transitions; 0 if an impossible one was counted.

    Each row is tested by itself (Billingsley 1961). Its cells with small expected counts are merged; if even together
    they are too few, they are left out, which only makes the statistic smaller.
    """
    if counts[table == 0].any():
        return 0.0
    expected = counts.sum(1, keepdim=True) * table
    is_large = expected >= _LEAST_EXPECTED
    is_small = ~is_large & (table > 0)
    rest, rest_expected = (values.where(is_small, 0.0).sum(1, keepdim=True) for values in (counts, expected))
    seen, wanted = torch.cat([counts, rest], dim=1), torch.cat([expected, rest_expected], dim=1)
    used = wanted >= _LEAST_EXPECTED
    statistic = ((seen - wanted) ** 2 / wanted)[used].sum()
    degrees = (is_large.sum(1) - (~is_small.any(1)).long()).clamp(min=0).sum()
    return float(torch.special.gammaincc(degrees.double() / 2, statistic / 2)) if degrees else 1.0
