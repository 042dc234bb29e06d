"""On a GPU every scheme verifies as on a CPU: the same path and token for the same random numbers, without a wait.

So the exact laws, which run on the CPU, hold there too.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mcsd import SCHEMES, SamplingParams, TreeShape
from mcsd.rng import DRAW, VERIFY, PhiloxStream
from mcsd.sampling import BatchSamplingParams, SparseDistributions
from mcsd.schemes import CandidateTree, Scheme, TokenHistory, VerificationResult
from mcsd.schemes.mixed_shape import MixedShape
from mcsd.schemes.registry import REGISTRY
from support.simulated_cuda import DEVICE, SimulatedCuda, recording, simulated

VOCABULARY, SUPPORT, BATCH = 70, 6, 7
CPU = torch.device("cpu")
TREES = ("none", "chain:3", "2x2x1", "parents:-1,-1,-1,0,0,1,3")

PLAIN = SamplingParams(temperature=0.8)
SETTINGS = {
    "sampled": (PLAIN, SamplingParams()),
    "greedy": (SamplingParams(temperature=0),),
    "mixed": (PLAIN, SamplingParams(temperature=0), SamplingParams(top_p=0.6)),
    "truncated": (SamplingParams(top_k=5), SamplingParams(top_p=0.7), SamplingParams(min_p=0.1, top_k=40), PLAIN),
    "penalties": (
        SamplingParams(repetition_penalty=1.3, presence_penalty=-0.4),
        PLAIN,
        SamplingParams(frequency_penalty=0.7, logit_bias={3: 2.0, 60: -1.5}),
    ),
    "greedy with penalties": (SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.3),),
}


@dataclass(frozen=True)
class Case:
    """One batch of trees to verify, on the CPU."""

    scheme: Scheme
    tree: CandidateTree
    logits: Tensor
    params: tuple[SamplingParams, ...]
    prompts: list[list[int]]
    texts: list[list[int]]

    def verify(self, device: torch.device) -> VerificationResult:
        """The result on a device, as tensors there."""

        def to(tensor: Tensor) -> Tensor:
            return simulated(tensor.clone()) if device == DEVICE else tensor.clone()

        q = self.tree.q
        tree = CandidateTree(
            self.tree.shape,
            to(self.tree.tokens),
            to(self.tree.valid),
            to(self.tree.choice),
            q and SparseDistributions(to(q.support), to(q.weights)),
            to(self.tree.failed),
            self.tree.mixed,
        )
        sampling = BatchSamplingParams.of(self.params, device)
        history = TokenHistory(self.prompts, [text[:-2] for text in self.texts])
        random = PhiloxStream(to(torch.arange(BATCH)), to(torch.zeros(BATCH, dtype=torch.int64)), VERIFY)
        if sampling.any_penalties and device == DEVICE:
            # The history of a batch is told of the last two tokens as a step would tell it.
            history.penalties(sampling, to(self.logits[:, 0]))
            added = torch.tensor([text[-2:] for text in self.texts])
            shape = TreeShape.parse("chain:1")
            path = to(torch.zeros(BATCH, 1, dtype=torch.int64))
            step = replace(tree, shape=shape, mixed=None, tokens=to(added[:, :1]), valid=path.bool())
            last = VerificationResult(path, path[:, 0] + 1, to(added[:, 1]), tree.failed)
            history.append(step, last)
        else:
            history = TokenHistory(self.prompts, self.texts)
        if device != DEVICE:
            return self.scheme.verify(tree, to(self.logits), sampling, history, random)
        logits = to(self.logits)
        self.scheme.verify(tree, logits, sampling, history, random)  # Fills the caches of constants.
        random = PhiloxStream(to(torch.arange(BATCH)), to(torch.zeros(BATCH, dtype=torch.int64)), VERIFY)
        with recording() as counts:
            result = self.scheme.verify(tree, logits, sampling, history, random)
        assert not counts.mixed
        assert not counts.reads
        assert not counts.copies
        return result


def case(name: str, shape: TreeShape, settings: tuple[SamplingParams, ...], seed: int, has_q: bool = True) -> Case:
    """Random distributions and candidates drawn by the scheme; some nodes, drafts and targets fail."""
    generator = torch.Generator().manual_seed(seed)
    scheme = SCHEMES[name]()
    params = tuple(settings[index % len(settings)] for index in range(BATCH))
    sampling = BatchSamplingParams.of(params, CPU)
    columns = 1 + len(shape)
    q = torch.rand(BATCH, columns, SUPPORT, generator=generator) ** 3 + 1e-3
    q /= q.sum(-1, keepdim=True)
    support = torch.rand(BATCH, columns, VOCABULARY, generator=generator).topk(SUPPORT, dim=-1).indices
    tokens, choice = torch.zeros(BATCH, len(shape)).long(), torch.zeros(BATCH, len(shape)).long()
    valid = torch.rand(BATCH, len(shape), generator=generator) > 0.1
    random = PhiloxStream(torch.arange(BATCH), torch.zeros(BATCH).long(), DRAW)
    for column, children in enumerate(shape.children.tolist()):
        nodes = [node for node in children if node >= 0]
        if nodes:
            drawn = scheme.draw(q[:, column, None], [len(nodes)], sampling, random)[:, 0]
            for rank, node in enumerate(nodes):
                choice[:, node], valid[:, node] = drawn[:, rank].clamp(min=0), valid[:, node] & (drawn[:, rank] >= 0)
                tokens[:, node] = support[:, column].gather(1, choice[:, node, None])[:, 0]
        else:
            q[:, column] = 0
    failed = torch.arange(BATCH) == 5
    tree = CandidateTree(shape, tokens, valid, choice, SparseDistributions(support, q) if has_q else None, failed)
    logits = torch.randn(BATCH, columns, VOCABULARY, generator=generator)
    # Candidates are likely under the target, so that paths are long.
    logits = logits.scatter_add(2, support, 4 + torch.zeros(support.shape))
    logits[6, columns // 2] = torch.nan
    prompts = torch.randint(VOCABULARY, (BATCH, 4), generator=generator).tolist()
    texts = torch.randint(VOCABULARY, (BATCH, 5), generator=generator).tolist()
    return Case(scheme, tree, logits, params, prompts, texts)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_results_as_on_a_cpu(name: str, settings: str) -> None:
    accepted = 0
    widest = REGISTRY[name].max_width
    shapes = [shape for shape in map(TreeShape.parse, TREES) if widest is None or shape.width <= widest]
    for seed, shape in enumerate(shapes):
        each = case(name, shape, SETTINGS[settings], seed)
        expected = each.verify(CPU)
        with SimulatedCuda():
            result = each.verify(DEVICE)
        assert result.failed.tolist() == expected.failed.tolist()
        assert result.path.tolist() == expected.path.tolist()
        assert result.accepted.tolist() == expected.accepted.tolist()
        # The token of a sequence that has failed is not used.
        tokens, wanted = (each.token.masked_fill(each.failed, 0).tolist() for each in (result, expected))
        assert tokens == wanted
        accepted += int(expected.accepted.sum())
    assert accepted


@pytest.mark.parametrize("settings", SETTINGS)
def test_candidates_that_were_not_drawn(settings: str) -> None:
    for seed, tree in enumerate(TREES):
        each = case("top-k", TreeShape.parse(tree), SETTINGS[settings], seed, has_q=False)
        expected = each.verify(CPU)
        with SimulatedCuda():
            result = each.verify(DEVICE)
        assert result.path.tolist() == expected.path.tolist()
        assert result.failed.tolist() == expected.failed.tolist()


def with_chain(each: Case, length: int) -> Case:
    """A case with a looked-up chain beside its candidates; the first token of the chain is often probable."""
    tree, generator = each.tree, torch.Generator().manual_seed(length)
    assert tree.q is not None
    mixed = MixedShape(tree.shape, length)
    order = torch.tensor(mixed.order)
    probable = each.logits[:, 0].nan_to_num().topk(3, dim=-1).indices[torch.arange(BATCH), torch.arange(BATCH) % 3]
    rest = torch.randint(VOCABULARY, (BATCH, length - 1), generator=generator)
    valid = (torch.arange(BATCH) % 4 != 3)[:, None].expand(-1, length)
    chain = torch.cat([probable[:, None], rest], dim=1), valid, torch.zeros(BATCH, length).long()
    nodes = [
        torch.cat(parts, dim=1)[:, order] for parts in zip(chain, (tree.tokens, tree.valid, tree.choice), strict=True)
    ]
    # Columns of the chain get those of the root; it has no q.
    drawn = torch.tensor([0, *(1 + node for node in mixed.drawn_nodes)])
    leaves = torch.tensor([False, *(node < 0 for node in mixed.drawn_nodes)])
    weights = tree.q.weights[:, drawn].masked_fill(leaves[:, None], 0.0)
    q = SparseDistributions(tree.q.support[:, drawn], weights)
    whole = CandidateTree(mixed.shape, nodes[0], nodes[1], nodes[2], q, tree.failed, mixed)
    return replace(each, tree=whole, logits=each.logits[:, drawn])


@pytest.mark.parametrize("settings", ["sampled", "mixed", "penalties"])
@pytest.mark.parametrize("name", [name for name in SCHEMES if not REGISTRY[name].tree_level])
def test_a_chain_beside_drawn_candidates(name: str, settings: str) -> None:
    looked_up = drawn = 0
    for seed, (tree, length) in enumerate([("chain:3", 2), ("2x2x1", 2), ("2x1", 4), ("none", 3)]):
        each = with_chain(case(name, TreeShape.parse(tree), SETTINGS[settings], seed), length)
        expected = each.verify(CPU)
        with SimulatedCuda():
            result = each.verify(DEVICE)
        assert result.failed.tolist() == expected.failed.tolist()
        assert result.path.tolist() == expected.path.tolist()
        tokens, wanted = (each.token.masked_fill(each.failed, 0).tolist() for each in (result, expected))
        assert tokens == wanted
        first = expected.path[:, 0]
        looked_up, drawn = looked_up + int((first == 0).sum()), drawn + int((first > 0).sum())
    assert looked_up
    assert drawn


def test_a_read_and_a_mixed_operation_are_recorded() -> None:
    with SimulatedCuda(), recording() as counts:
        tensor = torch.ones(3, device=DEVICE)
        assert tensor.device == DEVICE
        total = tensor + torch.ones(3)
        total[0].item()
        total[total > 1]
        total[[0, 1]]
        torch.tensor([1.0], device=DEVICE)
        total.to("cpu")
    assert counts.mixed.total() == 1
    assert counts.reads.total() == 3
    assert counts.copies.total() == 2
    assert counts.launches["add"] == 1
