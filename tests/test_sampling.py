"""The one path from logits to probabilities, against transformers' own processors and warpers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mcsd.params import SamplingParams
from mcsd.sampling import BatchSamplingParams, apply_penalties, probabilities, sparse_probabilities

CPU = torch.device("cpu")

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=2.5, top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=1e-60),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=10**6, temperature=0.3),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1),
]


def short(p: SamplingParams) -> str:
    return f"{p.temperature}-{p.top_k}-{p.top_p}-{p.min_p}"


def random_logits(rows: int, width: int, seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) * scale


def by_mcsd(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    return probabilities(logits, BatchSamplingParams.of(params, CPU))


def by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities ``[V]`` by the warpers of `transformers.generate`, in its order."""
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).to(logits.dtype)
    warpers: list[Any] = [TemperatureLogitsWarper(float(params.temperature))]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    warpers += [TypicalLogitsWarper(params.typical_p)] if params.typical_p < 1 else []
    none: Any = None
    return LogitsProcessorList(warpers)(none, logits[None]).softmax(-1)[0]


def assert_same_distribution(p: Tensor, expected: Tensor, atol: float) -> None:
    assert p.dtype == expected.dtype
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [1, 2, 50, 3000])
def test_a_mixed_batch_is_what_transformers_samples_from(width: int, seed: int) -> None:
    """float32, to 1e-6: about ten units of rounding; a wrongly cut token weighs 1e-4 and more."""
    logits = random_logits(len(MIXED), width, seed)
    before = logits.clone()
    for p, row, params in zip(by_mcsd(logits, MIXED), logits, MIXED, strict=True):
        assert_same_distribution(p, by_transformers(row, params), 1e-6)
    assert torch.equal(logits, before)


@given(
    st.floats(0.05, 5),
    st.integers(0, 40),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.sampled_from([1.0, 0.9, 0.5, 0.1]),
    st.integers(1, 40),
    st.integers(0, 999),
)
@examples(deadline=None, max_examples=150, derandomize=True)
def test_any_parameters(
    temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float, width: int, seed: int
) -> None:
    """float64 on both sides, so that no cut falls within rounding. The examples are always the same."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    logits = random_logits(1, width, seed, dtype=torch.float64)
    torch.testing.assert_close(by_mcsd(logits, [params])[0], by_transformers(logits[0], params), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.95},
        {"top_p": 0.1},
        {"min_p": 0.05},
        {"top_k": 1000},
        {"top_k": 1024},
        {"top_k": 1025},
        {"top_k": 4999},
        {"top_k": 2000, "top_p": 0.9},
        {"top_k": 1024, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 1500, "top_p": 0.5},
        {"top_k": 10**6, "top_p": 0.7},
    ],
    ids=str,
)
def test_flat_logits_over_a_large_vocabulary(params: dict[str, Any]) -> None:
    """So flat that the most probable 1024 of 5000 tokens do not suffice: each token weighs 1e-4, a wrong cut shows."""
    logits = random_logits(2, 5000, 7, scale=0.1, dtype=torch.float64)
    batch = [SamplingParams(**params), SamplingParams(top_k=5)]
    for p, row, each in zip(by_mcsd(logits, batch), logits, batch, strict=True):
        assert_same_distribution(p, by_transformers(row, each), 1e-9)


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_k": 4}, {"top_k": 3, "min_p": 0.3}, {"top_k": 1}], ids=str)
def test_ties_with_the_kth_token_are_kept(params: dict[str, Any]) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, -1.0])
    given = SamplingParams(**params)
    assert_same_distribution(by_mcsd(logits[None], [given])[0], by_transformers(logits, given), 1e-6)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 0.76])
def test_a_mass_that_reaches_top_p_exactly(top_p: float) -> None:
    """Four equal tokens: any of them may be kept, but their number is fixed."""
    given, logits = SamplingParams(top_p=top_p), torch.zeros(4)
    assert_same_distribution(
        by_mcsd(logits[None], [given])[0].sort().values, by_transformers(logits, given).sort().values, 1e-6
    )


def test_ties_beyond_the_first_sort() -> None:
    """The tokens of rank 901 to 2100 tie with the 1000th; top-p counts the mass of all of them.

    Top-p may keep any of equal tokens, so the probabilities are compared in sorted order.
    """
    logits = torch.zeros(5000, dtype=torch.float64)
    logits[:900] = 1.0
    logits[2100:] = -1.0
    for params in (SamplingParams(top_k=1000), SamplingParams(top_k=1000, top_p=0.9)):
        assert_same_distribution(
            by_mcsd(logits[None], [params])[0].sort().values, by_transformers(logits, params).sort().values, 1e-9
        )


def test_sequences_are_independent() -> None:
    """A sequence has bitwise the same probabilities alone and in a batch, also beside sequences that are NaN."""
    for width in (60, 2500):
        logits = random_logits(len(MIXED) + 3, width, 3, scale=0.5)
        logits[-3, 5], logits[-2], logits[-1] = math.nan, -math.inf, math.nan
        batch = [*MIXED, SamplingParams(temperature=0), SamplingParams(top_k=5), SamplingParams(top_p=0.5)]
        p = by_mcsd(logits, batch)
        assert p[-3:].isnan().all()
        for row, params in enumerate(MIXED):
            assert torch.equal(p[row], by_mcsd(logits[row : row + 1], [params])[0])
            assert abs(p[row].sum().item() - 1) < 1e-5


@pytest.mark.parametrize("broken", [[math.nan, 0.0, 1.0], [-math.inf] * 3, [math.nan] * 3])
@pytest.mark.parametrize("params", MIXED, ids=short)
def test_logits_without_a_distribution_give_nan(params: SamplingParams, broken: list[float]) -> None:
    assert by_mcsd(torch.tensor([broken]), [params]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", MIXED, ids=short)
def test_a_large_vocabulary(params: SamplingParams, dtype: torch.dtype) -> None:
    logits = random_logits(1, 2**14 + 5, 9).to(dtype)
    # Top-p may keep any of equal tokens.
    assert_same_distribution(
        by_mcsd(logits, [params])[0].sort().values, by_transformers(logits[0].float(), params).sort().values, 1e-5
    )
    logits[0, -1] = math.nan
    assert by_mcsd(logits, [params]).isnan().all()


def test_masked_tokens_stay_masked() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    for params in MIXED:
        assert_same_distribution(by_mcsd(logits, [params])[0], by_transformers(logits[0], params), 1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 1e-60])
def test_tiny_temperatures_are_finite(temperature: float) -> None:
    logits = torch.tensor([[1e4, 3e4, -3e4, 2.9e4], [-5.0, -5.0, -7.0, -6.0]])
    p = by_mcsd(logits, [SamplingParams(temperature=temperature), SamplingParams(temperature=temperature, top_p=0.999)])
    assert torch.equal(p[0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert p[1].sum() == 1
    assert p[1, 2:].sum() == 0


@pytest.mark.parametrize("params", MIXED, ids=short)
def test_float64_stays_float64(params: SamplingParams) -> None:
    logits = random_logits(1, 50, 1, dtype=torch.float64)
    assert_same_distribution(by_mcsd(logits, [params])[0], by_transformers(logits[0], params), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_become_float32(dtype: torch.dtype) -> None:
    logits = random_logits(len(MIXED), 80, 2, dtype=dtype)
    p = by_mcsd(logits, MIXED)
    assert p.dtype == torch.float32
    assert torch.equal(p, by_mcsd(logits.float(), MIXED))
    q = sparse_probabilities(logits, BatchSamplingParams.of(MIXED, CPU), 16)
    assert q.weights.dtype == torch.float32


@pytest.mark.parametrize("extra", [0, 5])
def test_sparse_probabilities_of_the_whole_vocabulary(extra: int) -> None:
    logits = random_logits(len(MIXED), 60, 4)
    q = sparse_probabilities(logits, BatchSamplingParams.of(MIXED, CPU), 60 + extra)
    dense = torch.zeros(len(MIXED), 60).scatter_add(1, q.support, q.weights)
    for row, (params, expected) in enumerate(zip(MIXED, by_mcsd(logits, MIXED), strict=True)):
        if params.temperature == 0:  # keeps the draft's own distribution, which ranks the candidates
            expected = logits[row].softmax(-1)
        assert_same_distribution(dense[row], expected, 1e-6)


@pytest.mark.parametrize("width", [1, 8, 64])
def test_sparse_probabilities_are_the_top_k_renormalised(width: int) -> None:
    logits = random_logits(len(MIXED) + 1, 300, 5, scale=1.0)
    logits[-1, 3] = math.nan
    q = sparse_probabilities(logits, BatchSamplingParams.of([*MIXED, SamplingParams()], CPU), width)
    assert q.weights[-1].sum().isnan()
    support, weights = q.support[:-1], q.weights[:-1]
    assert weights.shape == support.shape == (len(MIXED), width)
    assert all(len(set(row)) == width for row in support.tolist())
    assert torch.equal(logits[:-1].gather(1, support), logits[:-1].topk(width).values)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(MIXED)))
    for row, params in enumerate(MIXED):
        if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
            expected = (logits[row, support[row]] / (params.temperature or 1.0)).softmax(-1)
            torch.testing.assert_close(weights[row], expected)
        if params.temperature and params.top_k:
            assert weights[row].count_nonzero() <= params.top_k


def test_select_takes_sequences() -> None:
    logits = random_logits(len(MIXED), 40, 6)
    rows = torch.tensor([7, 1, 1, 4])
    chosen = probabilities(logits[rows], BatchSamplingParams.of(MIXED, CPU).select(rows))
    assert torch.equal(chosen, by_mcsd(logits, MIXED)[rows])


@pytest.mark.parametrize("penalty", [0.5, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_repetition_penalty_is_transformers(penalty: float, dtype: torch.dtype) -> None:
    logits = random_logits(1, 30, 8, dtype=dtype)[0]
    prompt, text = [3, 4, 4, 29], [0, 3, 17]
    shaped = apply_penalties(logits, SamplingParams(repetition_penalty=penalty), prompt, text)
    wide = logits if dtype == torch.float64 else logits.float()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + text]), wide[None].clone())[0]
    assert shaped.dtype == wide.dtype
    assert torch.equal(shaped, expected)


def test_presence_frequency_and_bias_by_hand() -> None:
    """Presence and frequency count the text only, the bias is added, and the given logits are not modified."""
    logits = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 3.0, 1: -10.0, 0: 0.125})
    shaped = apply_penalties(logits, params, prompt=[2, 2, 4], text=[0, 3, 3, 3, 1])
    assert shaped.tolist() == [1 - 0.75 + 0.125, -1 - 0.75 - 10, 0.5, 2 - 0.5 - 0.75, 3.0]
    assert apply_penalties(logits, params, [2], []).tolist() == [1.125, -11.0, 0.5, 2.0, 3.0]
    assert logits.tolist() == [1.0, -1.0, 0.5, 2.0, 0.0]


def test_all_penalties_together() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=-0.25)
    shaped = apply_penalties(torch.tensor([4.0, -4.0, 4.0, 4.0]), params, prompt=[2], text=[0, 1, 1])
    assert shaped.tolist() == [2 - 0.5 + 0.25, -8 - 0.5 + 0.5, 2.0, 4.0]


@pytest.mark.parametrize("top_p", [0.5, 0.7, 0.8, 0.9])
def test_masses_that_reach_top_p_exactly(top_p: float) -> None:
    """Every distribution over four tokens in tenths: where a sum equals top_p, the next token is cut."""
    tenths = [(a, b, c, 10 - a - b - c) for a in range(11) for b in range(11 - a) for c in range(11 - a - b)]
    params = SamplingParams(top_p=top_p)
    for masses in tenths:
        p = by_mcsd((torch.tensor([masses]) / 10).log(), [params])[0]
        ranked = sorted(masses, reverse=True)
        wanted = next(n for n in range(1, 5) if sum(ranked[:n]) >= round(10 * top_p))
        assert int((p > 0).sum()) == wanted, masses


def test_a_sequence_that_needs_the_full_sort_does_not_change_the_others() -> None:
    """Which of equal tokens are kept must not depend on the batch: bfloat16 makes many equal tokens."""
    flat = torch.zeros(1, 5000)
    for seed in range(20):
        row = random_logits(1, 5000, seed, dtype=torch.bfloat16).float()
        params = SamplingParams(top_p=0.9)
        alone = by_mcsd(row, [params])[0]
        assert torch.equal(alone, by_mcsd(torch.cat([flat, row]), [params, params])[1])
