"""Drafts with another tokenizer: their q, their contexts, and what an engine makes of them."""

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mcsd
import mcsd.hf
from mcsd import SamplingParams, TreeShape, errors
from mcsd.drafters import ModelDrafter
from mcsd.drafters.translated import TranslatedDrafter
from mcsd.models import TransformersModel
from mcsd.models.draft_vocabulary import cut_vocabulary
from mcsd.rng import DRAW, PhiloxStream
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES
from mcsd.testing import TabularModel
from support.small_tokenizers import characters, pieces, translated
from support.tiny import tiny

SIZE = 96
TOKENIZER = characters(range(SIZE), [SIZE - 1])
DRAFT_TOKENIZER = characters([0, *range(SIZE - 1, 0, -1)], range(10, 16))
"""As large as the other; it lacks seven of its tokens and has seven of its own."""

SPLIT = pieces({"a": 0, "bc": 1, "c": 2, "b": 3}, [("b", "c")])
SPLIT_OTHERWISE = pieces({"c": 0, "b": 1, "a": 2, "ab": 3}, [("a", "b")])


def network(size: int, seed: int, context: int = 64) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.LlamaConfig(vocab_size=size, max_position_embeddings=context, **sizes, **ids)
    made = transformers.LlamaForCausalLM(config).double().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5)
    return made


def q_after(drafter: TranslatedDrafter, texts: list[list[int]]) -> torch.Tensor:
    """q after texts, dense, float64 ``[B, 3]``."""
    sampling = BatchSamplingParams.of([SamplingParams()] * len(texts), torch.device("cpu"))
    numbers = torch.zeros(len(texts), dtype=torch.int64)
    random = PhiloxStream(numbers, numbers, DRAW)
    drafter.catch_up(texts)
    tree = drafter.draft(texts, TreeShape.parse("2"), SCHEMES["mcss-wor"](), sampling, random)
    assert tree.q is not None
    q = torch.zeros(len(texts), 3, dtype=torch.float64)
    return q.scatter(1, tree.q.support[:, 0], tree.q.weights[:, 0].double())


def expected_q(draft: Any, context: list[int]) -> torch.Tensor:
    """The draft's own distribution over "a" and "c", the target's 0 and 2, its 2 and 0."""
    with torch.no_grad():
        logits = draft(torch.tensor([context])).logits[0, -1]
    a, c = logits[[2, 0]].softmax(-1)
    return torch.stack([a, torch.zeros_like(a), c])


@pytest.mark.parametrize("cut", [False, True])
def test_q_is_the_drafts_distribution_over_shared_tokens(cut: bool) -> None:
    draft = network(4, 2)
    whole = TransformersModel(network(4, 2))
    if cut:
        cut_vocabulary(whole.network, torch.tensor([0, 2, 3]))
        whole.vocabulary = torch.tensor([0, 2, 3])
    model = translated(TransformersModel(network(3, 1)), SPLIT, whole, SPLIT_OTHERWISE)
    drafter = TranslatedDrafter(model, 2, 32)
    # "abc" and "ca" as the draft splits them; then "bc", "a" and "c", each by itself.
    texts, contexts = [[0, 1], [2, 0]], [[3, 0], [0, 2]]
    for text in texts:
        drafter.add(text, None)
    for more, own in (([], []), ([1], [1, 0]), ([0, 2], [2, 0])):
        texts = [[*text, *more] for text in texts]
        contexts = [[*context, *own] for context in contexts]
        expected = torch.stack([expected_q(draft, context) for context in contexts])
        torch.testing.assert_close(q_after(drafter, texts), expected)


def test_a_context_that_is_full_goes_on_with_its_latest_half() -> None:
    draft = network(4, 2, context=12)
    model = translated(TransformersModel(network(3, 1)), SPLIT, TransformersModel(draft), SPLIT_OTHERWISE)
    drafter = TranslatedDrafter(model, 1, 64)
    text, context = [0, 2] * 5, [2, 0] * 5
    drafter.add(text, None)
    for token, own in ((2, 0), (0, 2), (2, 0), (0, 2), (2, 0)):
        text, context = [*text, token], [*context, own]
        context = context[-6:] if len(context) > 12 else context
        torch.testing.assert_close(q_after(drafter, [text])[0], expected_q(draft, context))
    assert len(context) == 8


def engines(tree: Any = "2x2x1", context: int = 256, **options: Any) -> tuple[mcsd.Engine, mcsd.Engine]:
    """An engine with a draft of another tokenizer, and one without a draft."""
    target, draft = tiny("llama"), tiny("llama", seed=1)
    draft.config.max_position_embeddings = context
    with pytest.warns(errors.McsdWarning, match="the 89 tokens that both have, of 96"):
        engine = mcsd.Engine(target, draft, TOKENIZER, tree=tree, draft_tokenizer=DRAFT_TOKENIZER, **options)
    assert isinstance(engine.drafter, TranslatedDrafter)
    return engine, mcsd.Engine(target, "ngram", TOKENIZER, tree="none", **options)


@pytest.mark.parametrize("context", [2, 5, 16, 256])
@pytest.mark.parametrize("tree", ["chain:4", "4x2x1"])
def test_texts_of_a_batch_are_the_targets_own(tree: str, context: int) -> None:
    """More prompts than sequences, of different lengths, some of them longer than the draft's context."""
    engine, plain = engines(tree, context, max_batch=3, max_length=64)
    prompts = [[(7 * i + j) % SIZE for j in range(1 + 5 * i)] for i in range(7)]
    params = [SamplingParams(temperature=0, max_new_tokens=6 + 4 * i) for i in range(7)]
    found, expected = engine.generate(prompts, params), plain.generate(prompts, params)
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]


def test_a_translated_copy_of_the_target_is_accepted() -> None:
    """Only the ids differ, so all candidates are those that the target itself would choose."""
    target, order = tiny("llama"), torch.tensor([0, *range(SIZE - 1, 0, -1)])
    draft = tiny("llama")
    for matrix in (draft.get_input_embeddings(), draft.get_output_embeddings()):
        matrix.weight.data = matrix.weight.data[order]
    with pytest.warns(errors.McsdWarning, match="the 96 tokens"):
        engine = mcsd.Engine(
            target, draft, characters(range(SIZE)), "chain:4", draft_tokenizer=characters(order.tolist())
        )
    done = engine.generate([[5, 6, 7], [8]], SamplingParams(temperature=0, max_new_tokens=20))
    assert [each.stats.mean_acceptance_length for each in done] == [5, 5]


def test_tree_auto() -> None:
    engine, plain = engines("auto", max_length=100)
    params = SamplingParams(temperature=0, max_new_tokens=20)
    assert engine.generate([5, 6, 7], params).token_ids == plain.generate([5, 6, 7], params).token_ids


def saved(folder: Path, tokenizer: Any, seed: int) -> str:
    tiny("llama", seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tokenizers_beside_the_weights_are_compared(tmp_path: Path) -> None:
    """Of models by name, and of a draft given as an object, by the folder that it was read from."""
    names = saved(tmp_path / "target", TOKENIZER, 0), saved(tmp_path / "draft", DRAFT_TOKENIZER, 1)
    target, draft = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in names)
    for given, tokenizer in product((draft, names[1]), (TOKENIZER, None)):
        with pytest.warns(errors.McsdWarning, match="another tokenizer"):
            engine = mcsd.Engine(target, given, tokenizer, tree="2x1")
        assert isinstance(engine.drafter, TranslatedDrafter)
    ids = torch.tensor([[3, 4]])
    method = mcsd.hf.speculative(draft, tree="2x1")
    with pytest.warns(errors.McsdWarning, match="another tokenizer"):
        out = target.generate(ids, custom_generate=method, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(out, target.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0))
    with pytest.warns(errors.McsdWarning, match="another tokenizer"):
        loaded = mcsd.Engine.load(*names, tree="2x1", dtype="float32")
    params = SamplingParams(temperature=0, max_new_tokens=8)
    assert loaded.generate([3, 4], params).token_ids == engine.generate([3, 4], params).token_ids


def uniform(size: int) -> TabularModel:
    return TabularModel(torch.full((size, size), 1 / size))


@pytest.mark.parametrize("sizes", [(8, 9), (9, 8), (9, 9)])
@pytest.mark.parametrize("known", [True, False])
def test_an_added_special_token_is_no_other_vocabulary(sizes: tuple[int, int], known: bool) -> None:
    tokenizers = [characters(range(8)) for _ in sizes]
    for size, tokenizer in zip(sizes, tokenizers, strict=True):
        if size == 9:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = mcsd.Engine(
            *map(uniform, sizes), tokenizers[0], tree="2x1", draft_tokenizer=tokenizers[1] if known else None
        )
    assert type(engine.drafter) is ModelDrafter
    done = engine.generate([sizes[0] - 1], SamplingParams(max_new_tokens=9, logit_bias={sizes[0] - 1: 2.0}))
    assert len(done.token_ids) == 9


def test_bad_pairs() -> None:
    apart = characters([8, 9, 10, 11])
    with pytest.raises(errors.VocabularyMismatch, match="share no token"):
        mcsd.Engine(uniform(4), uniform(4), characters(range(4)), draft_tokenizer=apart)
    with pytest.raises(errors.VocabularyMismatch, match="draft tabular has 5 tokens") as info:
        mcsd.Engine(uniform(4), uniform(5), characters(range(5)))
    assert "draft_tokenizer=" in info.value.hint
    with pytest.raises(errors.InvalidOption, match="is a name"):
        mcsd.Engine(uniform(4), uniform(4), draft_tokenizer="gpt2")
