"""``mcsd distill`` from options to a draft on disk: generate text, train on it, save the draft and its card."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mcsd.cpu.fastest import fastest_dtype, fastest_precision
from mcsd.cpu.weight_plan import Role, WeightPlan, plan_weights
from mcsd.distill.batches import Batches, collate
from mcsd.distill.card import card
from mcsd.distill.collector import HiddenStateCollector
from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.head_learner import STEPS_AHEAD, HeadLearner
from mcsd.distill.losses import LOSS_FUNCTIONS
from mcsd.distill.model_learner import ModelLearner, layer_stack, prune
from mcsd.distill.options import DistillOptions
from mcsd.distill.settings import check_run_settings
from mcsd.distill.sources import load_texts
from mcsd.distill.teacher import Teacher, check_teachable, most_frequent_tokens
from mcsd.distill.trainer import Budget, Learner, TrainingReport, train
from mcsd.distill.writer import answer_prompts, generate_texts, read_texts, self_instruct
from mcsd.engine import Engine
from mcsd.errors import DataError
from mcsd.files import exclusive_lock, save_tensors, save_text, write_error
from mcsd.loading.catalog import locate
from mcsd.loading.load import LoadedModel, load, resolve_device
from mcsd.models.compatibility import check_tokenizers, check_vocabularies
from mcsd.models.draft_head import CONFIG_FILE, WEIGHTS_FILE, HeadConfig
from mcsd.models.draft_vocabulary import VOCABULARY_FILE
from mcsd.models.protocol import DecoderModel
from mcsd.prompts import load_prompts

TEXT = "text"
"""Subfolder of a draft with its training text."""

_MODEL_BATCH = 8
"""Texts per training step of a model."""

_HEAD_BATCH, _HEAD_SIZE = 16, 768
"""Texts per training step of a head, for each 768 of the hidden size, with which the optimizer's work grows."""

_MAX_LOGITS = 80_000_000
"""Maximum logits per step, for memory. Below it, all generated positions are trained on."""

_HEAD_VOCABULARY = 8192
"""Default draft vocabulary of a head; a model's is the full vocabulary."""

_SETTINGS, _CHECKPOINT = "distill.json", "checkpoint.safetensors"

_RATE_GIVEN, _RATE_PRUNED = 1e-5, 1e-3
"""Learning rates of a given model, and of a pruned one."""

_BATCHES_GIVEN = 4
"""Batches per step for a given model."""

_TEXT_SHARE = 0.4
"""Maximum fraction of the minutes for generating text."""

_NEW_TOKENS = 160
"""Maximum new tokens of a generated text."""

_MAX_TOKENS = 512
"""Maximum tokens of a training text, prompt included."""

_HELD_OUT = 20
"""One text in so many is held out, but at most 64; acceptance is measured at 1,024 of their positions."""

_HELD_TEXTS, _HELD_POSITIONS = 64, 1024


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called with the progress.

    Attributes:
        writing: called with the tokens of text so far.
        training: called with a report twice a minute.
    """

    writing: Callable[[int], None]
    training: Callable[[TrainingReport], None]


def distill(options: DistillOptions, callbacks: Callbacks) -> TrainingReport:
    """Train a draft, or resume an interrupted run.

    Returns:
        The last report. The draft is in ``options.out``, ready for ``--draft``.

    Raises:
        ModelError: about the target or the initial draft.
        InvalidOption: the folder belongs to a run with other options, or to a running one.
        DataError: prompts or text are missing, empty or unreadable.
        OutputFailed: a file cannot be written.
    """
    # Options and files are checked before the models are loaded, and both before anything is written.
    for name in (options.target, options.init):
        if name is not None:
            locate(name)
    prompts = load_prompts(options.prompts) if options.prompts else None
    earlier = options.data / TEXT if options.data and options.data.is_dir() else None
    texts = load_texts(options.data) if options.data and not earlier else None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(options.out, error) from error
    target, initial = _load_models(options)
    layers = hidden_layers(target.model)
    corpus = Corpus.of(earlier, options.target, layers) if earlier else None
    check_run_settings(options.out / _SETTINGS, options.settings())
    with exclusive_lock(options.out / _SETTINGS):
        if corpus is None:
            corpus = Corpus(
                options.out / TEXT, {"target": options.target, "states": list(layers), "seed": options.seed}
            )
            _fill_corpus(options, target, corpus, prompts, texts, callbacks.writing)
        held_out, training = _split_held_out(corpus.records())
        learner, teacher = _make_learner(options, target, initial, training)
        tokenizer = (initial or target).tokenizer
        # Frees the memory of the target except the parts that draft and teacher hold.
        del target, initial
        batch_size = (
            _MODEL_BATCH if options.kind == "model" else _HEAD_BATCH * max(1, teacher.hidden_size // _HEAD_SIZE)
        )
        positions = min(batch_size * _NEW_TOKENS, max(1, _MAX_LOGITS // len(teacher.vocabulary)))
        report = train(
            learner,
            Batches(training, batch_size, positions, STEPS_AHEAD - 1, options.seed),
            collate(held_out, _HELD_POSITIONS, STEPS_AHEAD - 1, torch.Generator().manual_seed(options.seed)),
            teacher,
            Budget(options.steps, max(1.0, options.minutes * 60 - (0 if earlier else corpus.seconds))),
            options.out / _CHECKPOINT,
            fastest_dtype(teacher.device),
            callbacks.training,
        )
        _save(options.out, learner, teacher.vocabulary if options.vocab else None, tokenizer)
        parameters = sum(p.numel() for p in learner.network.parameters() if p.requires_grad)
        settings = {name: value for name, value in asdict(options).items() if value is not None}
        text = card(options.target, options.command(), settings, report, corpus, parameters)
        save_text(options.out / "README.md", text)
        (options.out / _CHECKPOINT).unlink(missing_ok=True)
    return report


def _load_models(options: DistillOptions) -> tuple[LoadedModel, LoadedModel | None]:
    """The target in its fastest form; and for a draft model the model to start from, in float32."""
    device = resolve_device(options.device)
    dtype, quantize = fastest_precision(device)
    target = load(options.target, device, plan_weights(device, dtype, Role.TARGET, quantize))
    check_teachable(target.model)
    if options.kind == "head":
        return target, None
    initial = load(options.init or options.target, device, WeightPlan(torch.float32))
    check_vocabularies(target.model, initial.model, target.tokenizer)
    check_tokenizers(target.model, target.tokenizer, initial.model, initial.tokenizer)
    layers = _layers(options, initial.model)
    if layers:
        layer_stack(initial.model.weights, layers)
    return target, initial


def hidden_layers(target: DecoderModel) -> tuple[int, ...]:
    """The layers whose hidden states a head reads: at one third, at two thirds, and the last."""
    layers = target.num_layers
    return layers // 3, 2 * layers // 3, -1


def _fill_corpus(
    options: DistillOptions,
    target: LoadedModel,
    corpus: Corpus,
    prompts: list[str] | None,
    texts: list[str] | None,
    progress: Callable[[int], None],
) -> None:
    """Add texts to the corpus up to the requested number of tokens."""
    collector = HiddenStateCollector(hidden_layers(target.model))
    engine = Engine(target.model, collector, target.tokenizer, "none", max_batch=options.batch, max_length=_MAX_TOKENS)
    seconds = float("inf") if options.steps else options.minutes * 60 * _TEXT_SHARE
    if texts is not None:
        read_texts(engine, collector, texts, _MAX_TOKENS, corpus, options.tokens, seconds, progress)
        return
    if prompts is not None:
        source = answer_prompts(engine, prompts, options.seed, _NEW_TOKENS)
    else:
        source = self_instruct(engine, options.seed, _NEW_TOKENS)
    generate_texts(engine, collector, source, corpus, options.tokens, seconds, progress)


def _split_held_out(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Held-out texts, and training texts."""
    usable = [record for record in records if len(record.tokens) > max(STEPS_AHEAD, record.answer)]
    if len(usable) < 2:
        raise DataError(
            f"{len(usable)} texts to train on, of at least 2 (one is held out)",
            "give more prompts, text or time",
        )
    # By index, so that more text never moves a text from one side to the other.
    held = [record for record in usable if record.index % _HELD_OUT == 0] or usable[:1]
    numbers = {record.index for record in held}
    return held[:_HELD_TEXTS], [record for record in usable if record.index not in numbers] or held[1:]


def _make_learner(
    options: DistillOptions, target: LoadedModel, initial: LoadedModel | None, records: Sequence[Record]
) -> tuple[Learner, Teacher]:
    model = target.model
    torch.manual_seed(options.seed)
    loss = LOSS_FUNCTIONS[options.loss]
    if initial is None:
        frequent = most_frequent_tokens(
            records, options.vocab or _HEAD_VOCABULARY, model.vocab_size, model.eos_token_ids
        )
        teacher = Teacher(model, frequent)
        config = HeadConfig(
            target=options.target,
            target_vocab_size=model.vocab_size,
            hidden_size=teacher.hidden_size,
            hidden_layers=hidden_layers(model),
            num_layers=options.layers or 1,
            vocab_size=len(teacher.vocabulary),
        )
        return HeadLearner(config, teacher, loss, records), teacher
    # If the vocabularies differ in padding, only the tokens of both.
    known = min(model.vocab_size, initial.model.vocab_size)
    teacher = Teacher(model, most_frequent_tokens(records, options.vocab or known, known, model.eos_token_ids))
    layers = _layers(options, initial.model)
    if layers:
        prune(initial.model.weights, layers)
    rate, batches_per_step = (_RATE_PRUNED, 1) if layers else (_RATE_GIVEN, _BATCHES_GIVEN)
    return ModelLearner(initial.model.weights, teacher, loss, rate, batches_per_step), teacher


def _layers(options: DistillOptions, initial: DecoderModel) -> int | None:
    """Number of layers that a draft model is pruned to; None if it is not pruned."""
    return options.layers or (None if options.init else max(1, initial.num_layers // 8))


def _save(out: Path, learner: Learner, vocabulary: Tensor | None, tokenizer: Any | None) -> None:
    """Save the draft in bfloat16; its config last, so that a folder with a config is complete."""
    if isinstance(learner, HeadLearner):
        head = learner.network
        tensors = {
            name: tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in head.state_dict().items()
        }
        save_tensors(out / WEIGHTS_FILE, tensors)
        save_text(out / CONFIG_FILE, head.config.to_json())
        return
    network: Any = learner.network
    if vocabulary is not None:
        save_tensors(out / VOCABULARY_FILE, {"vocabulary": vocabulary})
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as part:
            network.to(torch.bfloat16).save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            for file in sorted(Path(part).iterdir(), key=lambda file: file.name == CONFIG_FILE):
                os.replace(file, out / file.name)
    except (OSError, SafetensorError) as error:
        raise write_error(out, error) from error
