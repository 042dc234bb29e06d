"""What the engine promises beyond the law: seeds, batches, ends, streams, statistics."""

from typing import Any

import pytest
import torch

import mcsd
from mcsd.drafters import Drafter, NgramDrafter
from mcsd.engine import Request
from mcsd.loading.load import LoadedModel
from mcsd.models.prefill import prefill
from mcsd.schemes.registry import REGISTRY
from mcsd.testing import TabularModel
from support.tiny import VOCABULARY, tiny

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [11, 3], [60, 61, 62], [9, 9, 9, 9], [33], [4, 8, 15, 16, 23, 42]]


def engine(tree: Any = "2x2x1", batch: int = 8, **options: Any) -> mcsd.Engine:
    return mcsd.Engine(tiny("llama"), tiny("llama", seed=1), tree=tree, max_batch=batch, max_length=200, **options)


def cycle(length: int = 6) -> TabularModel:
    """A model that counts: after i comes i + 1."""
    return TabularModel(torch.eye(length).roll(1, dims=1))


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(scheme: str) -> None:
    params = [mcsd.SamplingParams(temperature=0.9, max_new_tokens=20 + 3 * i, seed=i) for i in range(8)]
    tree = "chain:3" if REGISTRY[scheme].max_width == 1 else "2x2x1"
    together = engine(tree, scheme=scheme).generate(PROMPTS, params)
    three = engine(tree, 3, scheme=scheme).generate(PROMPTS, params)
    for prompt, one, expected, other in zip(PROMPTS, params, together, three, strict=True):
        (alone,) = engine(tree, 1, scheme=scheme).generate([prompt], one)
        assert alone.token_ids == expected.token_ids == other.token_ids


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
@pytest.mark.parametrize("target", [torch.float32, torch.float64], ids=["32", "64"])
@pytest.mark.parametrize("draft", [torch.float32, torch.float64], ids=["32", "64"])
def test_target_and_draft_may_differ_in_precision(scheme: str, target: torch.dtype, draft: torch.dtype) -> None:
    tree = "chain:3" if REGISTRY[scheme].max_width == 1 else "2x2"
    uniform = torch.full((4, 4), 0.25)
    models = TabularModel(uniform.to(target)), TabularModel(uniform.to(draft))
    done = mcsd.Engine(*models, tree=tree, scheme=scheme).generate([[0]] * 8, mcsd.SamplingParams(max_new_tokens=9))
    assert all(len(one.token_ids) == 9 for one in done)
    assert sum(one.stats.accepted_tokens for one in done) > 0


@pytest.mark.thorough
def test_the_same_seed_on_real_weights(smollm2: LoadedModel) -> None:
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=24, seed=11)
    texts = [
        "The sea",
        "A list of three colours: red,",
        "def main():",
        "Once",
        "1 2 3 4 5",
        "Dear",
        "It was",
        "Yes, yes,",
    ]
    together = mcsd.Engine(smollm2.model, "ngram", smollm2.tokenizer, tree="2x2").generate(texts, params)
    alone = mcsd.Engine(smollm2.model, "ngram", smollm2.tokenizer, tree="2x2", max_batch=1)
    # Every other one: alone they take longest.
    assert [alone.generate(text, params).text for text in texts[::2]] == [done.text for done in together[::2]]


def test_different_seeds_and_none_give_different_texts() -> None:
    runs = [
        engine().generate([[1, 2]], mcsd.SamplingParams(seed=seed, max_new_tokens=30))[0].token_ids
        for seed in (1, 2, None, None)
    ]
    assert len(set(runs)) == 4


@pytest.mark.parametrize("scheme", ["mcss-wor", "top-k"])
def test_a_prompt_of_several_texts_is_read_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []

    def counted(model: Any, cache: Any, row: int, tokens: list[int], *rest: Any) -> Any:
        read.append(tokens)
        return prefill(model, cache, row, tokens, *rest)

    monkeypatch.setattr("mcsd.core.prefill", counted)
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[0], PROMPTS[0], PROMPTS[3]]
    params = [mcsd.SamplingParams(max_new_tokens=20, seed=i) for i in range(5)]
    together = engine(scheme=scheme).generate(prompts, params)
    assert [tokens for tokens in read if tokens] == [PROMPTS[0][:-1], PROMPTS[3][:-1]]
    for prompt, one, done in zip(prompts, params, together, strict=True):
        (alone,) = engine(batch=1, scheme=scheme).generate([prompt], one)
        assert done.token_ids == alone.token_ids


def test_more_prompts_than_rows_come_back_in_order() -> None:
    done = mcsd.Engine(cycle(), cycle(), tree="2x2", max_batch=3).generate(
        [[i % 6] for i in range(20)],
        [mcsd.SamplingParams(temperature=0, max_new_tokens=1 + i % 7) for i in range(20)],
    )
    for i, completion in enumerate(done):
        assert completion.token_ids == tuple((i + 1 + j) % 6 for j in range(1 + i % 7))
        assert completion.finish_reason == "length"


class Ending(TabularModel):
    eos_token_ids = frozenset({3})


def test_eos_inside_an_accepted_path_ends_the_text() -> None:
    table = torch.eye(6).roll(1, dims=1)
    (done,) = mcsd.Engine(Ending(table), Ending(table), tree="chain:5").generate([[0]])
    assert done.token_ids == (1, 2, 3)
    assert done.finish_reason == "stop"
    assert done.stats.new_tokens == done.stats.accepted_tokens == 3
    assert done.stats.acceptance_histogram == (0, 0, 0, 1)
    (on,) = mcsd.Engine(Ending(table), Ending(table), tree="chain:5").generate(
        [[0]], mcsd.SamplingParams(ignore_eos=True, max_new_tokens=8)
    )
    assert on.token_ids == (1, 2, 3, 4, 5, 0, 1, 2)


def test_statistics_of_a_perfect_draft() -> None:
    (done,) = mcsd.Engine(cycle(), cycle(), tree="chain:3").generate([[0]], mcsd.SamplingParams(max_new_tokens=12))
    stats = done.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.target_calls) == (1, 12, 3)
    assert (stats.draft_tokens, stats.accepted_tokens, stats.acceptance_histogram) == (9, 9, (0, 0, 0, 3))
    assert (stats.mean_acceptance_length, stats.draft_acceptance_rate) == (4.0, 1.0)
    assert set(stats.seconds) == {"prefill", "draft", "target", "judge", "other"}
    assert all(seconds >= 0 for seconds in stats.seconds.values())


def test_plain_decoding_is_a_tree_of_size_zero() -> None:
    plain = engine("none")
    (done,) = plain.generate([[1, 2]], mcsd.SamplingParams(max_new_tokens=10))
    assert (done.stats.target_calls, done.stats.draft_tokens, plain.draft_name) == (10, 0, "none")


def test_the_context_bounds_the_text() -> None:
    small = mcsd.Engine(cycle(), cycle(), tree="2x2", max_length=10)
    (done,) = small.generate([[0, 1, 2]], mcsd.SamplingParams(max_new_tokens=100))
    assert (len(done.token_ids), done.finish_reason) == (7, "length")


def test_learned_positions_are_not_overrun() -> None:
    """GPT-2 has 256 positions: a tree that hangs over the end must not be looked up there."""
    network = tiny("gpt2")
    deep = mcsd.Engine(network, tiny("gpt2", seed=1), tree="2x2x2", max_length=10_000)
    prompt = [i % VOCABULARY for i in range(250)]
    (done,) = deep.generate([prompt], mcsd.SamplingParams(temperature=0, max_new_tokens=50))
    ids = torch.tensor([prompt])
    expected = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert done.token_ids == tuple(expected[0, 250:].tolist())


def test_streaming_gives_the_same_and_can_be_given_up() -> None:
    params = mcsd.SamplingParams(seed=4, max_new_tokens=25)
    subject = engine()
    (whole,) = subject.generate([[5, 6]], params)
    chunks = list(subject.stream([5, 6], params))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert sum(chunk.accepted for chunk in chunks) == whole.stats.accepted_tokens
    assert [chunk.completion is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    abandoned = subject.stream([5, 6], params)
    next(abandoned)
    abandoned.close()
    assert subject.generate([[5, 6]], params)[0].token_ids == whole.token_ids


def test_two_streams_run_side_by_side() -> None:
    subject = engine()
    seeds = [1, 2]
    expected = [
        subject.generate([[9]], mcsd.SamplingParams(seed=seed, max_new_tokens=15))[0].token_ids for seed in seeds
    ]
    streams = [subject.stream([9], mcsd.SamplingParams(seed=seed, max_new_tokens=15)) for seed in seeds]
    got: list[list[int]] = [[], []]
    live = [0, 1]
    while live:
        for i in list(live):
            chunk = next(streams[i], None)
            if chunk is None:
                live.remove(i)
            else:
                got[i] += chunk.token_ids
    assert [tuple(tokens) for tokens in got] == expected


def test_penalties_and_bias_are_honoured_on_every_node() -> None:
    """At temperature 0 the text with penalties is that of plain decoding, whatever was drafted."""
    params = mcsd.SamplingParams(
        temperature=0,
        max_new_tokens=40,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={7: 1.5, 8: -100.0},
    )
    plain = engine("none").generate(PROMPTS, params)
    assert [d.token_ids for d in engine("3x2x1").generate(PROMPTS, params)] == [d.token_ids for d in plain]
    assert all(8 not in done.token_ids for done in plain)
    free = engine("none").generate(PROMPTS, mcsd.SamplingParams(temperature=0, max_new_tokens=40))
    assert [d.token_ids for d in free] != [d.token_ids for d in plain]


def test_repetition_penalty_is_that_of_transformers() -> None:
    network = tiny("llama")
    ids = torch.tensor([PROMPTS[2]])
    expected = network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, repetition_penalty=1.5
    )
    subject = mcsd.Engine(network, "ngram", tree="3x2x1")
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=30, repetition_penalty=1.5)
    assert subject.generate([PROMPTS[2]], params)[0].token_ids == tuple(expected[0, 8:].tolist())


def test_logprobs_are_those_of_the_model() -> None:
    params = mcsd.SamplingParams(temperature=0.5, top_k=5, seed=3, max_new_tokens=20, logprobs=2)
    (done,) = engine().generate([PROMPTS[0]], params)
    assert done.logprobs is not None
    with torch.no_grad():
        ids = torch.tensor([[*PROMPTS[0], *done.token_ids]])
        expected = tiny("llama")(ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    assert len(done.logprobs) == 20
    for i, entry in enumerate(done.logprobs):
        row = expected[len(PROMPTS[0]) - 1 + i]
        assert entry.token_id == done.token_ids[i]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


class HiddenStateCollector(NgramDrafter):
    """Asks for hidden states of two layers and keeps what it is handed."""

    hidden_layers = (1, -1)

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        # It proposes all that it finds.
        self.cost = lambda batch_size, nodes: 1 / (1 + nodes)
        self.states: list[torch.Tensor] = []

    def add(self, prompt: list[int], hidden: torch.Tensor | None) -> None:
        super().add(prompt, hidden)
        assert hidden is not None
        self.states.append(hidden[0])

    def commit(self, path: torch.Tensor, paths: list[list[int]], hidden: torch.Tensor | None) -> None:
        assert hidden is not None
        self.states.append(hidden[0, : len(paths[0]) + 1])


def test_a_drafter_is_handed_the_hidden_states_of_committed_tokens() -> None:
    network = tiny("llama")
    recorder: Drafter = HiddenStateCollector()
    subject = mcsd.Engine(network, recorder, tree="2x2")
    (done,) = subject.generate([[5, 9, 2, 5, 9]], mcsd.SamplingParams(temperature=0, max_new_tokens=30))
    assert done.stats.accepted_tokens > 0
    ids = torch.tensor([[5, 9, 2, 5, 9, *done.token_ids]])
    with torch.no_grad():
        layers = network(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
        expected = torch.cat([layers[1], layers[-1]], dim=-1)[0]
    states = torch.cat(recorder.states)  # type: ignore[attr-defined]
    known = min(len(states), ids.shape[1] - 1)
    assert known >= 30
    torch.testing.assert_close(states[:known], expected[:known], atol=1e-4, rtol=1e-4)


def test_rows_come_and_go_while_others_run() -> None:
    subject = engine(batch=2)
    requests = [
        Request(prompt, mcsd.SamplingParams(seed=i, max_new_tokens=5 + 4 * i), 100, None, frozenset())
        for i, prompt in enumerate(PROMPTS)
    ]
    for request in requests[:3]:
        subject.submit(request)
    for _ in range(3):
        subject.step()
    for request in requests[3:]:
        subject.submit(request)
    subject.cancel(requests[1])
    subject.cancel(requests[5])
    while not all(request.done for i, request in enumerate(requests) if i not in (1, 5)):
        subject.step()
    for i, request in enumerate(requests):
        if i not in (1, 5):
            (alone,) = engine(batch=1).generate([PROMPTS[i]], request.params)
            assert request.completion is not None
            assert request.completion.token_ids == alone.token_ids
    assert all(isinstance(requests[i].error, mcsd.errors.RequestInterrupted) for i in (1, 5))
    assert all(requests[i].completion is None for i in (1, 5))
