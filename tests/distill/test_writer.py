"""The corpus has the generated tokens, and the hidden states that a separate forward gives."""

from pathlib import Path

import pytest
import torch

import mcsd
from mcsd.distill import writer
from mcsd.distill.collector import HiddenStateCollector
from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.writer import TEMPERATURES, answer_prompts, generate_texts, read_texts, self_instruct
from mcsd.errors import DataError
from mcsd.loading.load import LoadedModel
from mcsd.models import TransformersModel
from mcsd.models.prefill import prefill
from support.tiny import tiny

LAYERS = (1, -1)
# Hidden states are stored in bfloat16, with a relative precision of 1/256.
ROUNDED = {"atol": 0.05, "rtol": 0.01}
FOREVER = float("inf")


def silent(tokens: int) -> None:
    pass


def collecting(
    model: TransformersModel, tokenizer: object = None, batch: int = 4
) -> tuple[mcsd.Engine, HiddenStateCollector]:
    collector = HiddenStateCollector(LAYERS)
    return mcsd.Engine(model, collector, tokenizer, "none", max_batch=batch, max_length=200), collector


def test_hidden_states_are_those_of_a_separate_forward(family: str, tmp_path: Path) -> None:
    """Sequences of unequal length that are added and removed."""
    engine, collector = collecting(TransformersModel(tiny(family)))
    prompts: list[list[int]] = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], [3, 3], [8, 1, 9, 4]]
    source = answer_prompts(engine, prompts, 0, 20)  # type: ignore[arg-type] (token ids are prompts too)
    corpus = Corpus(tmp_path, {"target": family})
    generate_texts(engine, collector, source, corpus, 10**6, FOREVER, silent)
    records = corpus.records()
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    for record, prompt in zip(records, prompts, strict=True):
        text = record.tokens.tolist()
        assert text[: len(prompt)] == prompt
        assert (record.answer, len(text)) == (len(prompt), len(prompt) + 19)
        cache = engine.target.new_cache(1, 64)
        states = prefill(engine.target, cache, cache.add(), text, LAYERS)
        assert states is not None
        torch.testing.assert_close(record.hidden_states.float(), states[0], **ROUNDED)


def test_a_text_depends_on_its_index_and_not_on_the_batch(tmp_path: Path) -> None:
    texts = []
    for batch in (1, 5):
        engine, collector = collecting(TransformersModel(tiny("llama")), batch=batch)
        corpus = Corpus(tmp_path / str(batch), {"target": "tiny"})
        generate_texts(engine, collector, self_instruct(engine, 3, 30), corpus, 250, FOREVER, silent)
        texts.append({record.index: record.tokens.tolist() for record in corpus.records()})
    shared = texts[0].keys() & texts[1].keys()
    assert len(shared) >= 5
    assert all(texts[0][i] == texts[1][i] for i in shared)
    assert len({tuple(text) for text in texts[0].values()}) == len(texts[0])


def test_the_target_generates_both_sides_of_a_conversation(smollm2: LoadedModel, tmp_path: Path) -> None:
    engine, collector = collecting(smollm2.model, smollm2.tokenizer, batch=6)
    corpus = Corpus(tmp_path, {"target": "smollm2"})
    generate_texts(engine, collector, self_instruct(engine, 0, 16), corpus, 300, FOREVER, silent)
    records = corpus.records()
    assert len({tuple(record.tokens.tolist()) for record in records}) == len(records) >= 3
    for record in records:
        prompt = smollm2.tokenizer.decode(record.tokens[: record.answer])
        opening, _, turn = prompt.partition("<|im_start|>user\n")
        assert opening.startswith("<|im_start|>system")
        said, end, rest = turn.partition("<|im_end|>\n<|im_start|>assistant\n")
        assert said.strip()
        assert end
        assert rest == ""
        assert len(record.tokens) > record.answer


def test_temperatures_alternate() -> None:
    engine, _ = collecting(TransformersModel(tiny("llama")))
    source = answer_prompts(engine, [[1]] * 6, 0, 20)  # type: ignore[list-item]
    jobs = [source(i) for i in range(7)]
    assert [job.request.params.temperature for job in jobs if job] == [*TEMPERATURES, *TEMPERATURES]
    assert jobs[6] is None


def test_given_text_is_split_into_pieces(smollm2: LoadedModel, tmp_path: Path) -> None:
    engine, collector = collecting(smollm2.model, smollm2.tokenizer)
    text = "The quick brown fox jumps over the lazy dog. " * 6
    corpus = Corpus(tmp_path, {"target": "smollm2"})
    read_texts(engine, collector, [text], 16, corpus, 10**6, FOREVER, silent)
    records = corpus.records()
    assert smollm2.tokenizer.decode([token for record in records for token in record.tokens.tolist()]).startswith(
        text[:200]
    )
    assert {len(record.tokens) for record in records[:-1]} == {16}
    assert all(record.answer == 0 for record in records)
    with pytest.raises(DataError, match="empty"):
        read_texts(engine, collector, [""], 16, corpus, 10**6, FOREVER, silent)


def test_reading_respects_the_time_limit(smollm2: LoadedModel, tmp_path: Path) -> None:
    engine, collector = collecting(smollm2.model, smollm2.tokenizer)
    corpus = Corpus(tmp_path, {"target": "smollm2"})
    read_texts(engine, collector, ["word " * 400], 16, corpus, 10**6, 0.0, silent)
    assert corpus.tokens == 0


def text_of(index: int, length: int) -> Record:
    return Record(index, torch.full((length,), index, dtype=torch.int32), torch.zeros(length, 4), 1)


def test_unfinished_texts_are_kept(tmp_path: Path) -> None:
    """One is saved unfinished, again when longer, then finished; the other is interrupted with the process."""
    corpus = Corpus(tmp_path, {"target": "tiny"})
    corpus.save([text_of(0, 2), text_of(1, 3)])
    corpus.save([text_of(0, 4), text_of(1, 5)])
    corpus.add(text_of(0, 6))
    corpus.save([text_of(1, 7)])
    for _ in range(2):
        again = Corpus(tmp_path, {"target": "tiny"})
        assert [(record.index, len(record.tokens)) for record in again.records()] == [(0, 6), (1, 7)]
        assert again.tokens == 13
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_generation_that_runs_out_of_time_keeps_unfinished_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collector = collecting(TransformersModel(tiny("llama")))
    corpus = Corpus(tmp_path, {"target": "tiny"})
    clock = iter(range(10**6))
    monkeypatch.setattr(writer.time, "monotonic", lambda: float(next(clock)))
    generate_texts(engine, collector, self_instruct(engine, 3, 150), corpus, 10**6, 50.0, silent)
    monkeypatch.undo()
    lengths = [len(record.tokens) for record in Corpus(tmp_path, {"target": "tiny"}).records()]
    assert len(lengths) == 4
    assert all(1 < length < 150 for length in lengths)


def test_a_deleted_shard_does_not_affect_the_others(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, {"target": "tiny"})
    for i in range(3):
        corpus.add(Record(i, torch.tensor([i, i], dtype=torch.int32), torch.zeros(2, 4, dtype=torch.bfloat16), 1))
        corpus.save()
    (tmp_path / "00001.safetensors").unlink()
    again = Corpus(tmp_path, {"target": "tiny"})
    again.add(Record(7, torch.tensor([7, 7], dtype=torch.int32), torch.zeros(2, 4, dtype=torch.bfloat16), 1))
    again.save()
    assert [record.index for record in Corpus(tmp_path, {"target": "tiny"}).records()] == [0, 2, 7]


def test_a_target_that_generates_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny("llama")
    network.lm_head.weight.data.fill_(float("nan"))
    engine, collector = collecting(TransformersModel(network))
    monkeypatch.setattr(writer, "_MAX_EMPTY", 20)
    corpus = Corpus(tmp_path, {"target": "tiny"})
    with pytest.raises(DataError, match="generated no text"):
        generate_texts(engine, collector, self_instruct(engine, 0, 20), corpus, 100, FOREVER, silent)


def test_a_prompt_that_is_too_long_is_named() -> None:
    engine, _ = collecting(TransformersModel(tiny("llama")))
    with pytest.raises(DataError, match="prompt 2"):
        answer_prompts(engine, [[1], [1] * 300], 0, 20)  # type: ignore[list-item]
