"""The largest acceptance that a draw allows, and that no scheme exceeds it: by enumeration of draw and verification."""

from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

import mcsd
from mcsd.sampling import BatchSamplingParams, SparseDistributions
from mcsd.schemes import CandidateTree, TokenHistory
from mcsd.schemes.optimum import iid_optimum, set_optimum
from mcsd.schemes.registry import REGISTRY
from support.distributions import distributions
from support.enumeration import Decisions, Enumerated, enumerate_all

TOKENS = 5
PAIRS = 40
ROUNDING = 1e-10
INDEPENDENT = ("mcss", "k-seq")
BEST_OF_THEIR_DRAW = ("greedy-draft", "spechub", "top-k")
CASES = [(scheme, k) for scheme, entry in sorted(REGISTRY.items()) for k in (1, 2, 3, 4) if k <= (entry.max_width or k)]


def pairs(seed: int, count: int = PAIRS) -> tuple[Tensor, Tensor]:
    """p and q ``[count, V]``, with zeros, one-hots and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    return distributions(count, TOKENS, generator), distributions(count, TOKENS, generator)


@dataclass(frozen=True)
class Exact:
    """A scheme at one node: its acceptance ``[A]``, and the law of its candidates ``[A, 2^V]``."""

    acceptance: Tensor
    sets: Tensor


def exact(scheme: str, p: Tensor, q: Tensor, k: int) -> Exact:
    """The sum over every outcome of draw and verification."""
    verifier, shape = mcsd.SCHEMES[scheme](), mcsd.TreeShape.parse(str(k))
    found = Exact(torch.zeros(len(p), dtype=torch.float64), torch.zeros(len(p), 1 << TOKENS, dtype=torch.float64))

    def run(decisions: Decisions, start: Tensor) -> list[list[int]]:
        count = len(start)
        random = Enumerated(decisions, torch.arange(count))
        sampling = BatchSamplingParams.of([mcsd.SamplingParams()] * count, torch.device("cpu"))
        drawn = verifier.draw(q[start, None], [k], sampling, random)[:, 0]
        choice, valid = drawn.clamp(min=0), drawn >= 0
        weights = torch.nn.functional.pad(q[start, None], (0, 0, 0, k))
        sparse = SparseDistributions(torch.arange(TOKENS).expand_as(weights), weights)
        tree = CandidateTree(shape, choice, valid, choice, sparse, torch.zeros(count, dtype=torch.bool))
        logits = p[start].log()[:, None].expand(-1, 1 + k, -1)
        result = verifier.verify(tree, logits, sampling, TokenHistory([[]] * count, [[]] * count), random)
        members = torch.zeros(count, TOKENS + 1).scatter(1, choice.where(valid, TOKENS), 1.0)[:, :TOKENS]
        bits = (members @ 2.0 ** torch.arange(TOKENS)).long()
        return torch.stack([bits, result.accepted], dim=1).tolist()

    for start, outcomes, chance in enumerate_all(len(p), run):
        bits, accepted = torch.tensor(outcomes).T
        found.sets.index_put_((start, bits), chance, accumulate=True)
        found.acceptance.index_add_(0, start, chance * accepted)
    assert (found.sets.sum(-1) - 1).abs().max() < ROUNDING
    return found


def transport(p: Tensor, law: Tensor) -> float:
    """The optimum of one pair as a linear program: the mass that flows from sets of candidates to their tokens."""
    sets = law.nonzero()[:, 0].tolist()
    edges = [(place, token) for place, bits in enumerate(sets) for token in range(TOKENS) if bits >> token & 1]
    limits = torch.zeros(len(sets) + TOKENS, len(edges))
    for edge, (place, token) in enumerate(edges):
        limits[place, edge] = limits[len(sets) + token, edge] = 1
    result = linprog([-1] * len(edges), A_ub=limits.numpy(), b_ub=torch.cat([law[sets], p]).numpy())
    assert result.success
    return float(-result.fun)


@pytest.mark.parametrize(("scheme", "k"), [case for case in CASES if case[1] < 4])
def test_trying_every_set_solves_the_transport_problem(scheme: str, k: int) -> None:
    p, q = pairs(seed=k, count=12)
    law = exact(scheme, p, q, k).sets
    best = torch.tensor([transport(*row) for row in zip(p, law, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(set_optimum(p, law), best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_prefixes_suffice_for_independent_draws(k: int) -> None:
    p, q = pairs(seed=10 + k)
    law = exact("mcss", p, q, k).sets
    torch.testing.assert_close(iid_optimum(p, q, k), set_optimum(p, law), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_mass_outside_the_support_may_be_one_column(k: int) -> None:
    p, q = pairs(seed=20 + k)
    q[:, 3:] = 0
    q[:, 0] += 1 - q.sum(-1)
    together = torch.cat([p[:, :3], p[:, 3:].sum(-1, keepdim=True)], dim=1)
    torch.testing.assert_close(iid_optimum(together, q[:, :3], k), iid_optimum(p, q, k), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("scheme", "k"), CASES)
def test_no_scheme_accepts_more_than_its_draw_allows(scheme: str, k: int) -> None:
    p, q = pairs(seed=30 + k, count=15)
    found = exact(scheme, p, q, k)
    best = set_optimum(p, found.sets)
    assert (found.acceptance <= best + ROUNDING).all()
    if scheme in INDEPENDENT:
        assert (found.acceptance <= iid_optimum(p, q, k) + ROUNDING).all()
    if scheme in BEST_OF_THEIR_DRAW or (k == 1 and scheme != "naive"):
        torch.testing.assert_close(found.acceptance, best, rtol=0, atol=ROUNDING)
    if k == 1 and scheme not in ("naive", "top-k"):
        torch.testing.assert_close(found.acceptance, torch.minimum(p, q).sum(-1), rtol=0, atol=ROUNDING)


def test_two_candidates_of_spechub_and_greedy_draft_are_the_same_sets() -> None:
    p, q = torch.rand(2, PAIRS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(35)) + 1e-3
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    hub, greedy = exact("spechub", p, q, 2), exact("greedy-draft", p, q, 2)
    torch.testing.assert_close(hub.sets, greedy.sets, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(hub.acceptance, greedy.acceptance, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_known_cases(k: int) -> None:
    p, _ = pairs(seed=40)
    torch.testing.assert_close(iid_optimum(p, p, k), torch.ones(len(p), dtype=p.dtype), rtol=0, atol=ROUNDING)
    disjoint = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.25, 0.75]])
    assert iid_optimum(*disjoint, k).item() == 0
    # q is one-hot: only that token can be accepted.
    one_hot = torch.tensor([[0.3, 0.7]]), torch.tensor([[1.0, 0.0]])
    assert iid_optimum(*one_hot, k).item() == pytest.approx(0.3)
    # Uniform q on two tokens, one-hot p: its token is among k draws unless all are the other one.
    uniform = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    assert iid_optimum(*uniform, k).item() == pytest.approx(1 - 0.5**k)


def test_the_optimum_does_not_fall_with_more_draws() -> None:
    p, q = pairs(seed=50)
    by_k = torch.stack([iid_optimum(p, q, k) for k in range(1, 9)])
    assert (by_k.diff(dim=0) >= -ROUNDING).all()
