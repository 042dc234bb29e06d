"""From a target to a draft on disk: reproducible, resumable, and every failure has a named error."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mcsd
from mcsd.distill import Callbacks, DistillOptions, distill, trainer, writer
from mcsd.distill.corpus import Corpus
from mcsd.distill.trainer import TrainingReport
from mcsd.errors import (
    DataError,
    InvalidOption,
    OutputFailed,
    UnknownModel,
    UnsupportedModel,
    VocabularyMismatch,
    WeightsCorrupt,
)
from mcsd.files import check_settings, exclusive_lock
from support.tiny import tiny

SILENT = Callbacks(lambda tokens: None, lambda report: None)
STEPS, TOKENS = 100, 6000
LAYERS = (0, 1, -1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk, without a tokenizer: it generates raw text."""
    folder = tmp_path_factory.mktemp("target")
    tiny("llama").save_pretrained(folder)
    return str(folder)


def options(target: str, out: Path, **changes: Any) -> DistillOptions:
    known = {"target": target, "out": out, "steps": STEPS, "tokens": TOKENS, "vocab": 64, "batch": 16, "seed": 5}
    return DistillOptions(**(known | changes))


@pytest.fixture(scope="module")
def made(target: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingReport]:
    out = tmp_path_factory.mktemp("made") / "head"
    return out, distill(options(target, out), SILENT)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_head_is_trained_and_drafts(target: str, made: tuple[Path, TrainingReport]) -> None:
    out, report = made
    untrained = out.parent / "untrained"
    before = distill(options(target, untrained, steps=1, data=out), SILENT)
    assert report.acceptance.sampled[0] > before.acceptance.sampled[0] + 0.03
    prompts = [[0, 4, 9], [3], [7, 7], [50]]
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=60)
    texts, accepted = [], []
    for draft, tree in ((out, "2x2"), (untrained, "2x2"), (None, "none")):
        done = mcsd.Engine.load(target, draft, tree=tree, dtype="float32").generate(prompts, params)
        texts.append([completion.token_ids for completion in done])
        accepted.append(sum(completion.stats.accepted_tokens for completion in done))
    assert texts[0] == texts[1] == texts[2]
    assert accepted[0] > accepted[1]


def test_the_folder_holds_the_draft_its_text_and_its_card(target: str, made: tuple[Path, TrainingReport]) -> None:
    out, report = made
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "config.json", "distill.json", "model.safetensors", "text")
    }
    card = (out / "README.md").read_text()
    assert f"--target {target}" in card
    assert f"{report.acceptance.sampled[0]:.3f}" in card
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in weights(out).items() if name != "vocabulary")


def test_the_same_seed_gives_the_same_draft(target: str, made: tuple[Path, TrainingReport], tmp_path: Path) -> None:
    distill(options(target, tmp_path / "same"), SILENT)
    assert same(weights(tmp_path / "same"), weights(made[0]))
    distill(options(target, tmp_path / "other", seed=6, data=made[0]), SILENT)
    assert not same(weights(tmp_path / "other"), weights(made[0]))


class StopError(Exception):
    """Interrupts the run."""


def stop_at(moment: int) -> Callable[[object], None]:
    left = [moment]

    def count(_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise StopError

    return count


@pytest.fixture(scope="module")
def whole(target: str, made: tuple[Path, TrainingReport], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft trained without interruption, on the text of another."""
    out = tmp_path_factory.mktemp("whole") / "head"
    distill(options(target, out, data=made[0]), SILENT)
    return out


@pytest.mark.parametrize("moment", [1, 7, 99])
def test_interrupted_training_resumes(
    target: str,
    made: tuple[Path, TrainingReport],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    """With a checkpoint at every step, the draft is bit for bit that of an uninterrupted run."""
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(trainer, "_SAVING", float("inf"))
    monkeypatch.setattr(trainer, "_MEASURING", float("inf"))
    wanted = options(target, tmp_path / "out", data=made[0])
    with pytest.raises(StopError):
        distill(wanted, Callbacks(SILENT.writing, stop_at(moment)))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    steps: list[int] = []
    distill(wanted, Callbacks(SILENT.writing, lambda report: steps.append(report.step)))
    assert steps == list(range(moment + 1, STEPS + 1))
    assert same(weights(tmp_path / "out"), weights(whole))


def test_interrupted_text_generation_resumes(
    target: str, made: tuple[Path, TrainingReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts on disk are kept; each text depends on its index alone, however often the run was interrupted."""
    monkeypatch.setattr(writer, "SAVE_SECONDS", -1.0)
    out = tmp_path / "out"
    for moment in (170, 200):
        with pytest.raises(StopError):
            distill(options(target, out), Callbacks(stop_at(moment), SILENT.training))
    kept = {record.index: record.tokens.tolist() for record in Corpus.of(out / "text", target, LAYERS).records()}
    assert kept
    distill(options(target, out), SILENT)
    records = {record.index: record.tokens.tolist() for record in Corpus.of(out / "text", target, LAYERS).records()}
    assert kept.items() <= records.items()
    whole = {record.index: record.tokens.tolist() for record in Corpus.of(made[0] / "text", target, LAYERS).records()}
    shared = records.keys() & whole.keys()
    # Rounding depends on the batch and may change a sample; most texts must be equal.
    # An interrupted text is a prefix of the full one.
    begun = [min(len(records[i]), len(whole[i])) for i in shared]
    equal = [records[i][:n] == whole[i][:n] for i, n in zip(shared, begun, strict=True)]
    assert sum(equal) > 0.8 * len(shared) > 5
    assert sum(map(len, records.values())) >= TOKENS


KILLED = """
import sys
from mcsd.distill import trainer, writer
from mcsd.cli import main
trainer.SAVE_SECONDS = writer.SAVE_SECONDS = 0.05
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_killed_three_times_ends_with_a_working_draft(target: str, tmp_path: Path) -> None:
    """SIGKILL while it generates text, while it trains, and once more."""
    out = tmp_path / "out"
    words = ["distill", "--target", target, "--out", out, "--steps", 150, "--tokens", TOKENS, "--vocab", 64]
    command = [sys.executable, "-c", KILLED, *map(str, [*words, "--batch", 4])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sign in ("text/00001.safetensors", "checkpoint.safetensors", "checkpoint.safetensors"):
        before = (out / sign).stat().st_mtime_ns if (out / sign).exists() else 0
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not ((out / sign).exists() and (out / sign).stat().st_mtime_ns > before):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] == 150
    assert not list(out.rglob(".*part"))
    engine = mcsd.Engine.load(target, out, tree="2x1", dtype="float32")
    (completion,) = engine.generate([[3]], mcsd.SamplingParams(max_new_tokens=40, seed=1))
    assert completion.stats.accepted_tokens > 0


def test_a_pruned_model(target: str, made: tuple[Path, TrainingReport], tmp_path: Path) -> None:
    wanted = options(target, tmp_path / "model", kind="model", layers=1, data=made[0])
    report = distill(wanted, SILENT)
    untrained = distill(options(target, tmp_path / "raw", kind="model", layers=1, data=made[0], steps=1), SILENT)
    assert report.acceptance.sampled[0] > untrained.acceptance.sampled[0] + 0.03
    engine = mcsd.Engine.load(target, tmp_path / "model", tree="2x2", dtype="float32")
    assert engine.drafter.model.num_layers == 1  # type: ignore[attr-defined]
    (done,) = engine.generate([[3]], mcsd.SamplingParams(max_new_tokens=40, seed=1))
    assert done.stats.accepted_tokens > 0


@pytest.fixture(scope="module")
def given(made: tuple[Path, TrainingReport], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a draft that starts as the target with noise on its weights."""
    draft = tiny("llama")
    torch.manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.data.std().nan_to_num()
    folder = tmp_path_factory.mktemp("init")
    draft.save_pretrained(folder)
    return {"kind": "model", "init": str(folder), "data": made[0]}


def test_a_given_model_is_fine_tuned(target: str, given: dict[str, Any], tmp_path: Path) -> None:
    before = distill(options(target, tmp_path / "before", steps=1, **given), SILENT)
    after = distill(options(target, tmp_path / "after", **given), SILENT)
    assert after.acceptance.sampled[0] > before.acceptance.sampled[0]
    assert mcsd.Engine.load(target, tmp_path / "after").drafter.model.num_layers == 2  # type: ignore[attr-defined]


def test_a_given_model_is_pruned(target: str, given: dict[str, Any], tmp_path: Path) -> None:
    distill(options(target, tmp_path / "pruned", steps=1, layers=1, **given), SILENT)
    assert mcsd.Engine.load(target, tmp_path / "pruned").drafter.model.num_layers == 1  # type: ignore[attr-defined]
    with pytest.raises(InvalidOption, match="layers=2"):
        distill(options(target, tmp_path / "out", layers=2, **given), SILENT)


def test_a_model_with_a_draft_vocabulary(target: str, given: dict[str, Any], tmp_path: Path) -> None:
    """It drafts tokens of its vocabulary only; the target still generates all others."""
    out = tmp_path / "trimmed"
    distill(options(target, out, vocab=20, **given | {"steps": 1}), SILENT)
    tokens = load_file(out / "vocabulary.safetensors")["vocabulary"].tolist()
    assert len(tokens) == 20
    engine = mcsd.Engine.load(target, out, tree="4x2", dtype="float32")
    proposed: list[int] = []
    draft = engine.drafter.draft

    def recorded(*args: Any) -> Any:
        tree = draft(*args)
        proposed.extend(tree.tokens.flatten().tolist())
        return tree

    engine.drafter.draft = recorded  # type: ignore[method-assign]
    prompts, params = [[3], [7, 9, 11]], mcsd.SamplingParams(temperature=0, max_new_tokens=40)
    texts = [done.token_ids for done in engine.generate(prompts, params)]
    assert set(proposed) <= set(tokens)
    assert len(set(proposed)) > 5
    plain = mcsd.Engine.load(target, tree="none", dtype="float32").generate(prompts, params)
    assert texts == [done.token_ids for done in plain]
    assert set().union(*texts) - set(tokens)
    # As a target it has the full vocabulary.
    assert mcsd.Engine.load(out, tree="none").generate([[3]], params)[0].token_ids


@pytest.mark.parametrize("ids", [[], [3, 2], [5, 5], [-1, 4], [0, 96]])
def test_a_wrong_vocabulary_is_named(target: str, given: dict[str, Any], tmp_path: Path, ids: list[int]) -> None:
    folder = tmp_path / "draft"
    shutil.copytree(given["init"], folder)
    save_file({"vocabulary": torch.tensor(ids, dtype=torch.int32)}, folder / "vocabulary.safetensors")
    with pytest.raises(WeightsCorrupt, match=r"vocabulary\.safetensors"):
        mcsd.Engine.load(target, folder)


@pytest.mark.parametrize("loss", ["tv", "reverse-kl"])
def test_other_losses_train_too(target: str, made: tuple[Path, TrainingReport], tmp_path: Path, loss: str) -> None:
    first = distill(options(target, tmp_path / "first", loss=loss, data=made[0], steps=1), SILENT)
    last = distill(options(target, tmp_path / "last", loss=loss, data=made[0]), SILENT)
    assert last.acceptance.sampled[0] > first.acceptance.sampled[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "tree"}, "tree"),
        ({"loss": "mse"}, "mse"),
        ({"layers": 0}, "layers"),
        ({"vocab": 1 << 30}, "vocab"),
        ({"steps": 0}, "steps"),
        ({"minutes": float("nan")}, "minutes"),
        ({"batch": 10**9}, "batch"),
        ({"seed": -1}, "seed"),
        ({"init": "x"}, "init"),
        ({"prompts": Path("a"), "data": Path("b")}, "prompts"),
    ],
)
def test_options_out_of_range_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        options("target", Path("out"), **changes)


@pytest.mark.parametrize("content", [None, "", "  \n", b"\xff\xfe\x00"])
@pytest.mark.parametrize("kind", ["data", "prompts"])
def test_data_without_text_is_named(tmp_path: Path, kind: str, content: str | bytes | None) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"text\.txt"):
        distill(options(str(tmp_path), tmp_path / "out", **{kind: path}), SILENT)


def test_a_folder_of_another_run_is_refused(target: str, made: tuple[Path, TrainingReport]) -> None:
    with pytest.raises(InvalidOption, match="vocab"):
        distill(options(target, made[0], vocab=32), SILENT)


def test_a_folder_of_another_format_version_is_refused(target: str, tmp_path: Path) -> None:
    settings = options(target, tmp_path).settings()
    (tmp_path / "distill.json").write_text(json.dumps({"version": 9, **settings}))
    with pytest.raises(InvalidOption, match="format version 9"):
        distill(options(target, tmp_path), SILENT)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "settings.json").write_text(json.dumps({"version": 9, "target": target, "states": LAYERS}))
    with pytest.raises(InvalidOption, match="format version 9"):
        distill(options(target, tmp_path / "out", data=tmp_path), SILENT)


def test_text_without_a_format_version_is_of_the_first(
    target: str, made: tuple[Path, TrainingReport], tmp_path: Path
) -> None:
    folder = tmp_path / "text"
    shutil.copytree(made[0] / "text", folder)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings.pop("version") == 1
    (folder / "settings.json").write_text(json.dumps(settings))
    for _ in range(2):
        assert Corpus.of(folder, target, LAYERS).tokens == Corpus.of(made[0] / "text", target, LAYERS).tokens


def test_a_folder_of_a_running_run_is_refused(target: str, tmp_path: Path) -> None:
    check_settings(tmp_path / "distill.json", options(target, tmp_path).settings())
    with exclusive_lock(tmp_path / "distill.json"), pytest.raises(InvalidOption, match="another process"):
        distill(options(target, tmp_path), SILENT)
    assert not (tmp_path / "text").exists()


def test_text_of_another_target_is_refused(made: tuple[Path, TrainingReport], tmp_path: Path) -> None:
    tiny("qwen2").save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="is of"):
        distill(options(str(tmp_path / "other"), tmp_path / "out", data=made[0]), SILENT)


def test_a_folder_that_cannot_be_written_is_named(target: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputFailed, match="cannot write"):
        distill(options(target, tmp_path / "file" / "out"), SILENT)


def test_a_full_disk_is_named_and_nothing_half_written_stays(target: str, tmp_path: Path) -> None:
    """A limit on file sizes simulates it: the write fails in the middle of a shard."""
    out = tmp_path / "out"
    limited = (
        "import resource, signal, sys; from mcsd.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["distill", "--target", target, "--out", str(out), "--steps", "5", "--tokens", str(TOKENS)]
    done = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"distill.json", "settings.json"}


def test_a_draft_with_another_vocabulary_is_refused(target: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(VocabularyMismatch, match="50"):
        distill(options(target, tmp_path / "out", kind="model", init=str(tmp_path / "other")), SILENT)


def test_wrong_options_leave_no_files_behind(target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidOption, match="layers=2"):
        distill(options(target, out, kind="model", layers=2), SILENT)
    with pytest.raises(UnknownModel):
        distill(options(target + "x", out), SILENT)
    assert not list(out.iterdir())


def test_a_target_whose_hidden_states_do_not_give_its_logits_is_refused(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
        **{"num_key_value_heads": 2, "intermediate_size": 64, "final_logit_softcapping": 0.1},
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "target")
    with pytest.raises(UnsupportedModel, match="logits"):
        distill(options(str(tmp_path / "target"), tmp_path / "out"), SILENT)


@pytest.mark.parametrize(
    "broken", [{}, {"step": "1"}, {"step": "x", "seconds": "1"}, {"step": "1", "seconds": "1", "version": "9"}]
)
def test_a_broken_checkpoint_is_named(
    target: str, made: tuple[Path, TrainingReport], tmp_path: Path, broken: dict[str, str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_file({"network.nothing": torch.zeros(1)}, out / "checkpoint.safetensors", broken)
    with pytest.raises(WeightsCorrupt, match="checkpoint"):
        distill(options(target, out, data=made[0]), SILENT)


def test_a_broken_shard_is_named(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "text"
    folder.mkdir(parents=True)
    (folder / "00000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsCorrupt, match="00000"):
        distill(options(target, tmp_path / "out"), SILENT)
