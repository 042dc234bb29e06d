"""EAGLE-3 heads: trained as they draft, written as other programs read them, continued from published ones."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mcsd
from mcsd.distill import Callbacks, DistillOptions, distill, trainer
from mcsd.distill.batches import Batch, Batches, collate
from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.head_learner import HeadLearner
from mcsd.distill.losses import LOSS_FUNCTIONS
from mcsd.distill.new_head import new_head
from mcsd.distill.teacher import Teacher
from mcsd.errors import InvalidOption, UnsupportedModel, VocabularyMismatch, WeightsCorrupt
from mcsd.loading.published_heads import load_head
from mcsd.models import BoundHead, TokenLayout, TransformersModel
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.models.prefill import hidden_states, prefill
from support import eagle
from support.eagle import VARIANTS, Published
from support.simulated_cuda import DEVICE, SimulatedCuda, move, recording

SILENT = Callbacks(lambda tokens: None, lambda report: None)
STEPS, TOKENS, KNOWN = 40, 2000, 40
TEXT = [5, 9, 2, 40, 9, 31, 8, 3, 17, 55]

EAGLE3 = [head for head in VARIANTS if head.format != "eagle" and head.size == eagle.HIDDEN]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target")
    eagle.target_network().save_pretrained(folder)
    return str(folder)


def options(target: str, out: Path, **changes: Any) -> DistillOptions:
    known = {"target": target, "out": out, "kind": "eagle3", "steps": STEPS, "tokens": TOKENS, "batch": 16, "seed": 5}
    return DistillOptions(**({**known, "vocab": KNOWN} | changes))


@pytest.fixture(scope="module")
def made(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "head"
    distill(options(target, out, ttt_steps=3), SILENT)
    return out


def test_a_head_is_trained_and_drafts(target: str, made: Path) -> None:
    untrained = made.parent / "untrained"
    before = distill(options(target, untrained, steps=1, data=made, ttt_steps=3), SILENT).acceptance
    after = distill(options(target, made, ttt_steps=3), SILENT).acceptance
    assert len(after.sampled) == 3
    assert all(late > early + 0.02 for late, early in zip(after.sampled, before.sampled, strict=True))
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=60)
    texts, accepted = [], []
    for draft, tree in ((made, "2x2"), (untrained, "2x2"), (None, "none")):
        done = mcsd.Engine.load(target, draft, tree=tree, dtype="float32").generate([[0, 4, 9], [3], [50]], params)
        texts.append([completion.token_ids for completion in done])
        accepted.append(sum(completion.stats.accepted_tokens for completion in done))
    assert texts[0] == texts[1] == texts[2]
    assert accepted[0] > accepted[1]


def test_the_folder_is_in_the_format_of_speculators(target: str, made: Path) -> None:
    fields, tensors = json.loads((made / "config.json").read_text()), load_file(made / "model.safetensors")
    assert fields["speculators_model_type"] == fields["speculators_config"]["algorithm"] == "eagle3"
    verifier = {"name_or_path": target, "architectures": ["LlamaForCausalLM"]}
    assert fields["speculators_config"]["verifier"] == verifier
    assert fields["eagle_aux_hidden_state_layer_ids"] == [2, 5, 7]
    assert fields["draft_vocab_size"] == KNOWN == len(tensors["d2t"]) == tensors["t2d"].sum()
    tokens = torch.arange(KNOWN) + tensors["d2t"]
    assert tensors["t2d"].nonzero()[:, 0].tolist() == tokens.tolist()
    assert {tensor.dtype for name, tensor in tensors.items() if name not in ("d2t", "t2d")} == {torch.bfloat16}
    head = loaded(made)
    assert head.config.norm_before_residual
    assert head.vocabulary.tolist() == tokens.tolist()


def loaded(folder: Path) -> DraftHead:
    head = load_head(folder, eagle.target())
    assert head is not None
    return head


def learned(head: DraftHead, steps: int) -> list[torch.Tensor]:
    """Log-probabilities ``[T, K]`` of each step, as training computes them."""
    teacher = Teacher(eagle.target(), head.vocabulary)
    tokens = torch.tensor([TEXT, TEXT])
    layers = (*head.config.hidden_layers, -1)
    states = hidden_states(eagle.target(), tokens, layers)
    positions = torch.arange(len(TEXT), 2 * len(TEXT))
    batch = Batch(tokens, states, positions)
    learner = HeadLearner(head, teacher, LOSS_FUNCTIONS["kl"], steps, is_trained=True, sample=batch)
    with torch.no_grad():
        steps_ahead = learner.draft(batch)
    assert learner.finish() is head
    return steps_ahead


def drafted(head: DraftHead, step: int, position: int) -> torch.Tensor:
    """Log-probabilities ``[K]`` after a token that lies ``step`` levels below the root of a tree."""
    bound, target, root = BoundHead(head, eagle.target(), "head"), eagle.target(), position - step
    cache = target.new_cache(1, len(TEXT))
    states = prefill(target, cache, cache.add(), TEXT, head.config.hidden_layers)
    assert states is not None
    before = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, : root + 1]
    cache = bound.new_cache(1, len(TEXT) + 1)
    cache.add()
    output = bound.forward(torch.tensor([TEXT[: root + 1]]), before, TokenLayout.chain(root + 1), cache)
    cache.commit(torch.arange(root + 1)[None], torch.tensor([root + 1]))
    for level, token in enumerate(TEXT[root + 1 : position + 1], 1):
        assert output.hidden is not None
        layout = TokenLayout(torch.arange(level), torch.ones(1, level, dtype=torch.bool))
        output = bound.forward(torch.tensor([[token]]), output.hidden[:, -1:], layout, cache, own=True)
    return output.logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("published", [None, *EAGLE3], ids=str)
def test_a_head_is_trained_on_what_it_computes_when_it_drafts(published: Published | None, tmp_path: Path) -> None:
    """The masks, positions and hidden states of training are those of a tree, three levels deep."""
    if published is None:
        torch.manual_seed(1)
        head = DraftHead(HeadConfig("t", eagle.VOCABULARY, eagle.HIDDEN, (2, 5, -1), 2, eagle.VOCABULARY))
    else:
        published.write(tmp_path)
        head = loaded(tmp_path)
    steps = learned(head, 3)
    for step, found in enumerate(steps):
        for position in range(3, len(TEXT)):
            torch.testing.assert_close(found[position], drafted(head, step, position), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("published", EAGLE3, ids=str)
def test_a_published_head_is_continued(target: str, made: Path, tmp_path: Path, published: Published) -> None:
    """Two steps change its weights a little, and nothing else."""
    tensors = published.write(tmp_path / "given")
    given = loaded(tmp_path / "given")
    init = {"init": str(tmp_path / "given"), "vocab": None, "steps": 2, "hidden_states": "computed", "data": made}
    report = distill(options(target, tmp_path / "out", **init), SILENT)
    assert report.step == 2
    head = loaded(tmp_path / "out")
    before, after = given.config, head.config
    names = ("target_vocab_size", "hidden_layers", "vocab_size", "feature_norm", "norm_before_residual", "norm_output")
    assert all(getattr(before, name) == getattr(after, name) for name in names)
    assert before.decoder == after.decoder
    assert head.vocabulary.tolist() == eagle.tokens_of(published)
    changed = {
        name: (tensor - head.state_dict()[name]).abs().max() / tensor.abs().max()
        for name, tensor in given.state_dict().items()
        if name != "vocabulary"
    }
    frozen = {"embed_tokens.weight"} if "embed_tokens.weight" in tensors else set()
    # bfloat16 rounds by at most 1/256.
    assert all(change < 1 / 256 if name in frozen else 0 < change < 0.05 for name, change in changed.items())


def test_hidden_states_of_padded_texts_are_those_of_each_text(target: str) -> None:
    model = mcsd.Engine.load(target, tree="none", dtype="float32").target
    texts = [TEXT, TEXT[:4], TEXT[::-1][:7]]
    tokens = torch.zeros(3, len(TEXT), dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    found = hidden_states(model, tokens, (2, -1))
    for row, text in zip(found, texts, strict=True):
        cache = model.new_cache(1, len(text))
        expected = prefill(model, cache, cache.add(), text, (2, -1))
        assert expected is not None
        torch.testing.assert_close(row[: len(text)], expected[0], atol=1e-4, rtol=1e-3)


def test_computed_hidden_states_are_the_stored_ones(target: str, made: Path) -> None:
    """Stored ones may be those of a target in bfloat16. They are ten times nearer than those of the next position."""
    model = mcsd.Engine.load(target, tree="none", dtype="float32").target
    compute = partial(hidden_states, model, hidden_layers=(2, 5, 7, -1))
    records = Corpus.of(made / "text", target, (2, 5, 7, -1)).records()
    stored, computed = (Batches(records, 4, 100, 2, 0, source)[1] for source in (None, compute))
    assert torch.equal(stored.tokens, computed.tokens)
    inside = stored.hidden_states.abs().sum(-1, keepdim=True) > 0
    error = (stored.hidden_states - computed.hidden_states * inside).norm()
    assert error < 0.1 * (stored.hidden_states[:, 1:] - stored.hidden_states[:, :-1]).norm()


def test_with_computed_hidden_states_none_are_stored(target: str, made: Path, tmp_path: Path) -> None:
    report = distill(options(target, tmp_path, tokens=400, hidden_states="computed"), SILENT)
    before = distill(options(target, tmp_path / "before", steps=1, data=made), SILENT)
    assert report.acceptance.sampled[0] > before.acceptance.sampled[0] + 0.02
    shards = [load_file(shard) for shard in (tmp_path / "text").glob("*.safetensors")]
    assert sum(shard["tokens"].numel() for shard in shards) >= 400
    assert all(shard["states"].numel() == 0 for shard in shards)


def test_training_on_a_gpu_mixes_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target computes the hidden states of a batch, and the head is trained on them, on a simulated GPU."""
    monkeypatch.setattr("mcsd.models.kv_cache._free_bytes", lambda device: 1 << 34)
    vocabulary = torch.tensor(eagle.KNOWN, dtype=torch.int32)
    on_host = Teacher(eagle.target(), vocabulary)
    head = new_head("eagle3", eagle.target(), "target", 1, on_host, torch.ones(1, eagle.HIDDEN))
    with SimulatedCuda():
        target = TransformersModel(move(eagle.new_target_network()))
        records = [Record(index, torch.tensor(TEXT[index:]), torch.empty(0), 2) for index in range(3)]
        compute = partial(hidden_states, target, hidden_layers=(2, 5, 7, -1))
        with recording() as counts:
            batch = collate(records, 12, 2, torch.Generator().manual_seed(0), compute).to(DEVICE)
            teacher = Teacher(target, vocabulary)
            learner = HeadLearner(move(head), teacher, LOSS_FUNCTIONS["kl"], 3, False, batch)
            outputs = [*learner.draft(batch), *teacher.distribution(batch)]
    assert not counts.mixed
    assert all(output.device == DEVICE for output in outputs)


class StopError(Exception):
    """Interrupts the run."""


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("states", ["stored", "computed"])
def test_interrupted_training_resumes(
    target: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: str, continued: bool
) -> None:
    """With a checkpoint at every step, the head is bit for bit that of an uninterrupted run."""
    for name, value in (("SAVE_SECONDS", -1.0), ("_SAVING", float("inf")), ("_MEASURING", float("inf"))):
        monkeypatch.setattr(trainer, name, value)
    changes: dict[str, Any] = {"data": made, "hidden_states": states, "steps": 8}
    if continued:
        changes |= {"init": str(made), "vocab": None}
    distill(options(target, tmp_path / "whole", **changes), SILENT)

    def stop(report: trainer.TrainingReport) -> None:
        if report.step == 3:
            raise StopError

    with pytest.raises(StopError):
        distill(options(target, tmp_path / "out", **changes), Callbacks(SILENT.writing, stop))
    steps: list[int] = []
    distill(options(target, tmp_path / "out", **changes), Callbacks(SILENT.writing, lambda r: steps.append(r.step)))
    assert steps == [4, 5, 6, 7, 8]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_text_that_has_changed_is_no_text_to_resume_with(
    target: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another draft vocabulary would give the rows of the output matrix other tokens."""
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    text = tmp_path / "data" / "text"
    shutil.copytree(made / "text", text)

    def stop(report: trainer.TrainingReport) -> None:
        raise StopError

    resumed = options(target, tmp_path / "out", data=tmp_path / "data")
    with pytest.raises(StopError):
        distill(resumed, Callbacks(SILENT.writing, stop))
    for shard in text.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors["tokens"] = eagle.VOCABULARY - 1 - tensors["tokens"]
        save_file(tensors, shard, {"seconds": "0"})
    with pytest.raises(WeightsCorrupt, match="text has changed"):
        distill(resumed, SILENT)


def test_a_head_of_another_kind_or_target_is_refused(target: str, made: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"init": str(made), "vocab": None}
    with pytest.raises(InvalidOption, match="kind eagle3"):
        distill(options(target, tmp_path / "out", **given | {"kind": "head"}), SILENT)
    with pytest.raises(InvalidOption, match="keeps"):
        options(target, tmp_path / "out", kind="head", init=str(made))
    with pytest.raises(InvalidOption, match="keeps"):
        distill(options(target, tmp_path / "out", init=str(made)), SILENT)
    with pytest.raises(InvalidOption, match="a language model"):
        distill(options(target, tmp_path / "out", **given | {"init": target}), SILENT)
    fields = json.loads((made / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(made / "model.safetensors")
    (other / "config.json").write_text(json.dumps(fields | {"eagle_aux_hidden_state_layer_ids": [2, 5, 9]}))
    with pytest.raises(UnsupportedModel, match="layers"):
        distill(options(target, tmp_path / "out", **given | {"init": str(other)}), SILENT)
    smaller = tmp_path / "smaller"
    network = eagle.new_target_network()
    network.resize_token_embeddings(eagle.VOCABULARY - 4)
    network.save_pretrained(smaller)
    with pytest.raises(VocabularyMismatch, match="56"):
        distill(options(str(smaller), tmp_path / "out", **given), SILENT)
    assert not list((tmp_path / "out").iterdir())
