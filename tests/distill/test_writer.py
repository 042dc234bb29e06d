"""What the target writes is recorded as it was: tokens, and the hidden states that a fresh forward gives."""

from pathlib import Path

import pytest
import torch

import mcsd
from conftest import tiny
from mcsd.distill import writer
from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.recorder import Recorder
from mcsd.distill.writer import TEMPERATURES, answers, invented, read, write
from mcsd.errors import DataError
from mcsd.models import TransformersModel
from mcsd.models.loading import Loaded
from mcsd.models.prefill import prefill

LAYERS = (1, -1)
# The states are stored in bfloat16: eight bits, so one part in 256 of the largest they are added up from.
ROUNDED = {"atol": 0.05, "rtol": 0.01}
FOREVER = float("inf")


def silent(tokens: int) -> None:
    pass


def recording(model: TransformersModel, tokenizer: object = None, batch: int = 4) -> tuple[mcsd.Engine, Recorder]:
    recorder = Recorder(LAYERS)
    return mcsd.Engine(model, recorder, tokenizer, "none", max_batch=batch, max_length=200), recorder


def test_states_are_those_of_a_fresh_forward(family: str, tmp_path: Path) -> None:
    """Rows of unequal length that come and go."""
    engine, recorder = recording(TransformersModel(tiny(family)))
    prompts: list[list[int]] = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], [3, 3], [8, 1, 9, 4]]
    source = answers(engine, prompts, 0, 20)  # type: ignore[arg-type] (token ids are prompts too)
    corpus = Corpus(tmp_path, {"target": family})
    write(engine, recorder, source, corpus, 10**6, FOREVER, silent)
    records = corpus.records()
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    for record, prompt in zip(records, prompts, strict=True):
        text = record.tokens.tolist()
        assert text[: len(prompt)] == prompt
        assert (record.answer, len(text)) == (len(prompt), len(prompt) + 19)
        cache = engine.target.new_cache(1, 64)
        states = prefill(engine.target, cache, cache.add(), text, LAYERS)
        assert states is not None
        torch.testing.assert_close(record.states.float(), states[0], **ROUNDED)


def test_a_text_is_what_its_number_says_in_any_batch(tmp_path: Path) -> None:
    texts = []
    for batch in (1, 5):
        engine, recorder = recording(TransformersModel(tiny("llama")), batch=batch)
        corpus = Corpus(tmp_path / str(batch), {"target": "tiny"})
        write(engine, recorder, invented(engine, 3, 30), corpus, 250, FOREVER, silent)
        texts.append({record.index: record.tokens.tolist() for record in corpus.records()})
    shared = texts[0].keys() & texts[1].keys()
    assert len(shared) >= 5
    assert all(texts[0][i] == texts[1][i] for i in shared)
    assert len({tuple(text) for text in texts[0].values()}) == len(texts[0])


def test_the_target_invents_both_sides_of_a_conversation(smollm2: Loaded, tmp_path: Path) -> None:
    engine, recorder = recording(smollm2.model, smollm2.tokenizer, batch=6)
    corpus = Corpus(tmp_path, {"target": "smollm2"})
    write(engine, recorder, invented(engine, 0, 16), corpus, 300, FOREVER, silent)
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


def test_temperatures_take_turns() -> None:
    engine, _ = recording(TransformersModel(tiny("llama")))
    source = answers(engine, [[1]] * 6, 0, 20)  # type: ignore[list-item]
    jobs = [source(i) for i in range(7)]
    assert [job.request.params.temperature for job in jobs if job] == [*TEMPERATURES, *TEMPERATURES]
    assert jobs[6] is None


def test_given_text_is_read_in_pieces(smollm2: Loaded, tmp_path: Path) -> None:
    engine, recorder = recording(smollm2.model, smollm2.tokenizer)
    text = "The quick brown fox jumps over the lazy dog. " * 6
    corpus = Corpus(tmp_path, {"target": "smollm2"})
    read(engine, recorder, [text], 16, corpus, 10**6, FOREVER, silent)
    records = corpus.records()
    assert smollm2.tokenizer.decode([token for record in records for token in record.tokens.tolist()]).startswith(
        text[:200]
    )
    assert {len(record.tokens) for record in records[:-1]} == {16}
    assert all(record.answer == 0 for record in records)
    with pytest.raises(DataError, match="empty"):
        read(engine, recorder, [""], 16, corpus, 10**6, FOREVER, silent)


def test_reading_ends_in_time(smollm2: Loaded, tmp_path: Path) -> None:
    engine, recorder = recording(smollm2.model, smollm2.tokenizer)
    corpus = Corpus(tmp_path, {"target": "smollm2"})
    read(engine, recorder, ["word " * 400], 16, corpus, 10**6, 0.0, silent)
    assert corpus.tokens == 0


def text_of(index: int, length: int) -> Record:
    return Record(index, torch.full((length,), index, dtype=torch.int32), torch.zeros(length, 4), 1)


def test_a_text_that_is_never_finished_counts_as_far_as_it_is(tmp_path: Path) -> None:
    """Saved while it runs, again when it is longer, then whole; another breaks off with the process."""
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


def test_writing_that_runs_out_of_time_keeps_what_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, recorder = recording(TransformersModel(tiny("llama")))
    corpus = Corpus(tmp_path, {"target": "tiny"})
    clock = iter(range(10**6))
    monkeypatch.setattr(writer.time, "monotonic", lambda: float(next(clock)))
    write(engine, recorder, invented(engine, 3, 150), corpus, 10**6, 50.0, silent)
    monkeypatch.undo()
    lengths = [len(record.tokens) for record in Corpus(tmp_path, {"target": "tiny"}).records()]
    assert len(lengths) == 4
    assert all(1 < length < 150 for length in lengths)


def test_a_shard_that_was_deleted_costs_no_other(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, {"target": "tiny"})
    for i in range(3):
        corpus.add(Record(i, torch.tensor([i, i], dtype=torch.int32), torch.zeros(2, 4, dtype=torch.bfloat16), 1))
        corpus.save()
    (tmp_path / "00001.safetensors").unlink()
    again = Corpus(tmp_path, {"target": "tiny"})
    again.add(Record(7, torch.tensor([7, 7], dtype=torch.int32), torch.zeros(2, 4, dtype=torch.bfloat16), 1))
    again.save()
    assert [record.index for record in Corpus(tmp_path, {"target": "tiny"}).records()] == [0, 2, 7]


def test_a_target_that_writes_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny("llama")
    network.lm_head.weight.data.fill_(float("nan"))
    engine, recorder = recording(TransformersModel(network))
    monkeypatch.setattr(writer, "_BARREN", 20)
    corpus = Corpus(tmp_path, {"target": "tiny"})
    with pytest.raises(DataError, match="wrote nothing"):
        write(engine, recorder, invented(engine, 0, 20), corpus, 100, FOREVER, silent)


def test_a_prompt_that_is_too_long_is_named() -> None:
    engine, _ = recording(TransformersModel(tiny("llama")))
    with pytest.raises(DataError, match="prompt 2"):
        answers(engine, [[1], [1] * 300], 0, 20)  # type: ignore[list-item]
