"""``mcsd distill`` from its options to a draft on disk: write text, train on it, save the draft with its card."""

import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mcsd.catalog import locate
from mcsd.distill.batches import Batches, collate
from mcsd.distill.card import card
from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.head import AHEAD, HeadLearner
from mcsd.distill.losses import LOSSES
from mcsd.distill.model import ModelLearner, layers_of, prune
from mcsd.distill.recorder import Recorder
from mcsd.distill.sources import load_prompts, load_texts
from mcsd.distill.teacher import Teacher, check_teachable, frequent
from mcsd.distill.trainer import Budget, Learner, Report, train
from mcsd.distill.writer import answers, invented, read, write
from mcsd.engine import Engine
from mcsd.errors import DataError, InvalidOption
from mcsd.files import alone, same_settings, save_tensors, save_text, unwritable
from mcsd.models.compatibility import check_tokenizers, check_vocabularies
from mcsd.models.head import CONFIG, WEIGHTS, HeadConfig
from mcsd.models.loading import Loaded, choose_device, load
from mcsd.models.packing import fastest_dtype, fastest_form
from mcsd.models.transformers import TransformersModel
from mcsd.models.trimming import VOCABULARY

KINDS = ("head", "model")

TEXT = "text"
"""The folder, in that of a draft, of the text it learned from."""

_MODEL_ROWS = 8
"""Texts that a step of training a model reads."""

_HEAD_ROWS, _HEAD_SIZE = 16, 768
"""Texts that a step of training a head reads, for each so much of the hidden size: the optimizer's own work for a step
grows with that."""

_LOGITS = 80_000_000
"""The most logits of a step. Every position that the target wrote is learned if there is memory for it."""

_VOCABULARY = 8192
"""Tokens that a head can propose, unless told otherwise; a model can propose all."""

_SETTINGS, _CHECKPOINT = "distill.json", "checkpoint.safetensors"

_RATE_GIVEN, _RATE_PRUNED = 1e-5, 1e-3
"""Learning rates of a model that drafts well already, and of one that has lost most of its layers."""

_BATCHES_GIVEN = 4
"""Batches a step of a model that drafts well already."""

_WRITING = 0.4
"""The most of a budget in minutes that goes into writing text."""

_LENGTH = 160
"""New tokens of a text that the target writes."""

_READ = 512
"""Tokens of a prompt and its text together, and of a piece of given text: the longest texts that are learned from."""

_HELD_OUT = 20
"""One text in so many is held out, but at most 64, of which 1,024 positions are measured."""

_HELD_TEXTS, _HELD_POSITIONS = 64, 1024


@dataclass(frozen=True)
class Options:
    """What to make. The names are those of ``mcsd distill``, which says more.

    Attributes:
        target: whose draft.
        out: the folder it goes to.
        kind: "head" or "model".
        layers: of the draft; None: 1 for a head, all of ``init``, an eighth of the target's without one.
        init: a model to begin with, instead of the target; pruned if ``layers`` are given.
        vocab: tokens the draft can propose; None: 8192 for a head, all for a model.
        minutes: for text and training together; steps: of training, in place of minutes.
        tokens: of text, at most.
        prompts: a file of prompts to answer; data: text to read, or the folder of an earlier run, whose text is taken.
        loss: a name in `mcsd.distill.losses.LOSSES`.
        batch: texts that are written together.
        seed: of text and training.
        device: where to.

    Raises:
        InvalidOption: a value outside its range, or two that exclude each other.
    """

    target: str
    out: Path
    kind: str = "head"
    layers: int | None = None
    init: str | None = None
    vocab: int | None = None
    minutes: float = 60.0
    steps: int | None = None
    tokens: int = 1_000_000
    prompts: Path | None = None
    data: Path | None = None
    loss: str = "kl"
    batch: int = 96
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("loss", self.loss, tuple(LOSSES))):
            if value not in known:
                raise InvalidOption(f"{name} {value!r:.40} is unknown", f"one of {', '.join(known)}")
        most = {"layers": 64, "vocab": 1 << 22, "steps": 1 << 30, "tokens": 1 << 36, "batch": 1024, "seed": 1 << 31}
        for name, bound in most.items():
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if value is not None and not least <= value <= bound:
                raise InvalidOption(f"{name}={value} is outside {least} to {bound}", f"give such a {name}")
        if not 0 < self.minutes <= 1e6:
            raise InvalidOption(f"minutes={self.minutes} is outside 0 to 1e6", "give the minutes it may take")
        if self.init and self.kind == "head":
            raise InvalidOption("init is a model to begin with", "give it with --kind model")
        if self.prompts and self.data:
            raise InvalidOption("prompts and data exclude each other", "give one")

    def command(self) -> str:
        """The command line that says the same."""
        words = ["mcsd distill"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (field.default is MISSING or value != field.default):
                words.append(f"--{field.name} {shlex.quote(str(value))}")
        return " ".join(words)

    def settings(self) -> dict[str, str]:
        """What the draft depends on, but for how long it is trained."""
        budget = ("out", "minutes", "steps", "tokens", "device")
        return {name: str(value) for name, value in asdict(self).items() if name not in budget}


@dataclass(frozen=True)
class Events:
    """Who is told how the work goes on.

    Attributes:
        writing: tokens of text so far.
        training: a report twice a minute.
    """

    writing: Callable[[int], None]
    training: Callable[[Report], None]


def distill(options: Options, events: Events) -> Report:
    """Make a draft, or go on making it where an earlier run was broken off.

    Returns:
        The last report; the draft is in ``options.out``, ready for ``--draft``.

    Raises:
        ModelError: about the target or the initial draft.
        InvalidOption: the folder holds a run with other options, or one that is at work.
        DataError: prompts or text are missing, empty or unreadable.
        OutputFailed: something cannot be written.
    """
    # What can be wrong at once comes before the models, which take a while, and both before anything is written.
    for name in (options.target, options.init):
        if name is not None:
            locate(name)
    given = load_prompts(options.prompts) if options.prompts else None
    earlier = options.data / TEXT if options.data and options.data.is_dir() else None
    texts = load_texts(options.data) if options.data and not earlier else None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(options.out, error) from error
    target, initial = _models(options)
    states = states_of(target.model)
    corpus = Corpus.of(earlier, options.target, states) if earlier else None
    same_settings(options.out / _SETTINGS, options.settings())
    with alone(options.out / _SETTINGS):
        if corpus is None:
            corpus = Corpus(
                options.out / TEXT, {"target": options.target, "states": list(states), "seed": options.seed}
            )
            _write(options, target, corpus, given, texts, events.writing)
        held_out, learned = _split(corpus.records())
        learner, teacher = _learner(options, target, initial, learned)
        tokenizer = (initial or target).tokenizer
        # What neither draft nor teacher holds of the target makes room for training.
        del target, initial
        rows = _MODEL_ROWS if options.kind == "model" else _HEAD_ROWS * max(1, teacher.hidden_size // _HEAD_SIZE)
        positions = min(rows * _LENGTH, max(1, _LOGITS // len(teacher.vocabulary)))
        report = train(
            learner,
            Batches(learned, rows, positions, AHEAD - 1, options.seed),
            collate(held_out, _HELD_POSITIONS, AHEAD - 1, torch.Generator().manual_seed(options.seed)),
            teacher,
            Budget(options.steps, max(1.0, options.minutes * 60 - (0 if earlier else corpus.seconds))),
            options.out / _CHECKPOINT,
            fastest_dtype(teacher.device),
            events.training,
        )
        _save(options.out, learner, teacher.vocabulary if options.vocab else None, tokenizer)
        parameters = sum(p.numel() for p in learner.network.parameters() if p.requires_grad)
        settings = {name: value for name, value in asdict(options).items() if value is not None}
        text = card(options.target, options.command(), settings, report, corpus, parameters)
        save_text(options.out / "README.md", text)
        (options.out / _CHECKPOINT).unlink(missing_ok=True)
    return report


def _models(options: Options) -> tuple[Loaded, Loaded | None]:
    """The target, as it is soonest done, and what a model that drafts begins with, in float32."""
    device = choose_device(options.device)
    dtype, quantize = fastest_form(device)
    target = load(options.target, device, dtype, quantize=quantize)
    check_teachable(target.model)
    if options.kind == "head":
        return target, None
    initial = load(options.init or options.target, device, torch.float32)
    check_vocabularies(target.model, initial.model, target.tokenizer)
    check_tokenizers(target.model, target.tokenizer, initial.model, initial.tokenizer)
    layers = _layers(options, initial.model)
    if layers:
        layers_of(initial.model.network, layers)
    return target, initial


def states_of(target: TransformersModel) -> tuple[int, ...]:
    """The layers whose states a head reads: a third and two thirds up, and the last."""
    layers = target.layers
    return layers // 3, 2 * layers // 3, -1


def _write(
    options: Options,
    target: Loaded,
    corpus: Corpus,
    prompts: list[str] | None,
    texts: list[str] | None,
    progress: Callable[[int], None],
) -> None:
    """Bring the corpus to what was asked for."""
    recorder = Recorder(states_of(target.model))
    engine = Engine(target.model, recorder, target.tokenizer, "none", max_batch=options.batch, max_length=_READ)
    seconds = float("inf") if options.steps else options.minutes * 60 * _WRITING
    if texts is not None:
        read(engine, recorder, texts, _READ, corpus, options.tokens, seconds, progress)
        return
    if prompts is not None:
        source = answers(engine, prompts, options.seed, _LENGTH)
    else:
        source = invented(engine, options.seed, _LENGTH)
    write(engine, recorder, source, corpus, options.tokens, seconds, progress)


def _split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Texts that are held out, and those that are learned."""
    usable = [record for record in records if len(record.tokens) > max(AHEAD, record.answer)]
    if len(usable) < 2:
        raise DataError(
            f"{len(usable)} texts to learn from, where one is learned and one held out",
            "give more prompts, text or time",
        )
    # By number, so that more text never moves one from one side to the other.
    held = [record for record in usable if record.index % _HELD_OUT == 0] or usable[:1]
    numbers = {record.index for record in held}
    return held[:_HELD_TEXTS], [record for record in usable if record.index not in numbers] or held[1:]


def _learner(
    options: Options, target: Loaded, initial: Loaded | None, records: Sequence[Record]
) -> tuple[Learner, Teacher]:
    model = target.model
    torch.manual_seed(options.seed)
    loss = LOSSES[options.loss]
    if initial is None:
        likely = frequent(records, options.vocab or _VOCABULARY, model.vocab_size, model.eos_token_ids)
        teacher = Teacher(model, likely)
        config = HeadConfig(
            target=options.target,
            target_vocab_size=model.vocab_size,
            hidden_size=teacher.hidden_size,
            states=states_of(model),
            layers=options.layers or 1,
            vocabulary=len(teacher.vocabulary),
        )
        return HeadLearner(config, teacher, loss, records), teacher
    # Of models that differ in padding, the tokens of both.
    known = min(model.vocab_size, initial.model.vocab_size)
    teacher = Teacher(model, frequent(records, options.vocab or known, known, model.eos_token_ids))
    layers = _layers(options, initial.model)
    if layers:
        prune(initial.model.network, layers)
    rate, batches = (_RATE_PRUNED, 1) if layers else (_RATE_GIVEN, _BATCHES_GIVEN)
    return ModelLearner(initial.model.network, teacher, loss, rate, batches), teacher


def _layers(options: Options, beginning: TransformersModel) -> int | None:
    """How many layers a model that drafts is pruned to; None: it is taken as it is."""
    return options.layers or (None if options.init else max(1, beginning.layers // 8))


def _save(out: Path, learner: Learner, vocabulary: Tensor | None, tokenizer: Any | None) -> None:
    """The draft in bfloat16; its configuration last, so that a folder with one is whole."""
    if isinstance(learner, HeadLearner):
        head = learner.network
        tensors = {
            name: tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in head.state_dict().items()
        }
        save_tensors(out / WEIGHTS, tensors)
        save_text(out / CONFIG, head.config_json())
        return
    network: Any = learner.network
    if vocabulary is not None:
        save_tensors(out / VOCABULARY, {"vocabulary": vocabulary})
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as part:
            network.to(torch.bfloat16).save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            for file in sorted(Path(part).iterdir(), key=lambda file: file.name == CONFIG):
                os.replace(file, out / file.name)
    except (OSError, SafetensorError) as error:
        raise unwritable(out, error) from error
