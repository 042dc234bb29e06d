"""``mcsd distill`` from options to a draft on disk: generate text, train on it, save the draft and its card."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from mcsd.cpu.fastest import fastest_dtype, fastest_precision
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.distill.batches import Batches, collate
from mcsd.distill.card import card
from mcsd.distill.collector import HiddenStateCollector
from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.drafts import make_draft
from mcsd.distill.options import DistillOptions
from mcsd.distill.settings import check_run_settings
from mcsd.distill.sources import load_texts
from mcsd.distill.teacher import check_teachable
from mcsd.distill.trainer import Budget, TrainingReport, train
from mcsd.distill.writer import answer_prompts, generate_texts, read_texts, self_instruct
from mcsd.engine import Engine
from mcsd.errors import DataError
from mcsd.files import exclusive_lock, save_text, write_error
from mcsd.loading.catalog import locate
from mcsd.loading.load import LoadedModel, load, resolve_device
from mcsd.models.prefill import hidden_states
from mcsd.prompts import load_prompts

TEXT = "text"
"""Subfolder of a draft with its training text."""

_MAX_LOGITS = 80_000_000
"""Maximum logits per level of the tree in a training step, for memory; with three levels half of it, with four a third.
Below it, all generated positions are trained on."""

_SETTINGS, _CHECKPOINT = "distill.json", "checkpoint.safetensors"

_TEXT_SHARE = 0.4
"""Maximum fraction of the minutes for generating text."""

_NEW_TOKENS = 160
"""Maximum new tokens of a generated text."""

_MAX_TOKENS = 512
"""Maximum tokens of a training text, prompt included."""

_HELD_OUT = 20
"""One text in so many is held out, but at most 64; acceptance is measured at 1,024 of their positions."""

_HELD_TEXTS, _HELD_POSITIONS = 64, 1024

_SAMPLE_TEXTS, _SAMPLE_POSITIONS = 64, 8192
"""Of the training texts that the initial weights are fitted to."""


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
    target = _load_target(options)
    draft = make_draft(options, target)
    stored = draft.hidden_layers if options.hidden_states == "stored" else ()
    corpus = Corpus.of(earlier, options.target, stored) if earlier else None
    check_run_settings(options.out / _SETTINGS, options.settings())
    with exclusive_lock(options.out / _SETTINGS):
        if corpus is None:
            corpus = Corpus(
                options.out / TEXT, {"target": options.target, "states": list(stored), "seed": options.seed}
            )
            # More text would change the draft vocabulary.
            if not (options.out / _CHECKPOINT).exists():
                _fill_corpus(options, target, stored, corpus, prompts, texts, callbacks.writing)
        first = options.steps_ahead
        compute = None if stored else partial(hidden_states, target.model, hidden_layers=draft.hidden_layers)
        held_out, training = _split_held_out(corpus.records(), first)
        generator = torch.Generator().manual_seed(options.seed)
        held = collate(held_out, _HELD_POSITIONS, first, generator, compute).to(target.model.device)
        sample = collate(training[:_SAMPLE_TEXTS], _SAMPLE_POSITIONS, first, generator, compute).to(target.model.device)
        torch.manual_seed(options.seed)
        learner, teacher = draft.start(target.model, training, sample)
        # Frees the memory of the target, unless it computes hidden states.
        del target, sample
        logits = len(teacher.vocabulary) * max(1, first - 1)
        positions = min(draft.batch_size * _NEW_TOKENS, max(1, _MAX_LOGITS // logits))
        report = train(
            learner,
            Batches(training, draft.batch_size, positions, first, options.seed, compute),
            held,
            teacher,
            Budget(options.steps, max(1.0, options.minutes * 60 - (0 if earlier else corpus.seconds))),
            options.out / _CHECKPOINT,
            fastest_dtype(teacher.device),
            callbacks.training,
        )
        draft.save(options.out)
        parameters = sum(p.numel() for p in learner.network.parameters() if p.requires_grad)
        settings = {name: value for name, value in asdict(options).items() if value is not None}
        text = card(options.target, options.command(), settings, report, corpus, parameters)
        save_text(options.out / "README.md", text)
        (options.out / _CHECKPOINT).unlink(missing_ok=True)
    return report


def _load_target(options: DistillOptions) -> LoadedModel:
    """The target in its fastest form."""
    device = resolve_device(options.device)
    dtype, quantize = fastest_precision(device)
    target = load(options.target, device, plan_weights(device, dtype, Role.TARGET, quantize))
    check_teachable(target.model)
    return target


def _fill_corpus(
    options: DistillOptions,
    target: LoadedModel,
    layers: Sequence[int],
    corpus: Corpus,
    prompts: list[str] | None,
    texts: list[str] | None,
    progress: Callable[[int], None],
) -> None:
    """Add texts, with the hidden states of some layers, to the corpus up to the requested number of tokens."""
    collector = HiddenStateCollector(tuple(layers))
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


def _split_held_out(records: Sequence[Record], first: int) -> tuple[list[Record], list[Record]]:
    """Held-out texts, and training texts. Positions before ``first`` are not trained on."""
    usable = [record for record in records if len(record.tokens) > max(first, record.answer)]
    if len(usable) < 2:
        raise DataError(
            f"{len(usable)} texts to train on, of at least 2 (one is held out)",
            "give more prompts, text or time",
        )
    # By index, so that more text never moves a text from one side to the other.
    held = [record for record in usable if record.index % _HELD_OUT == 0] or usable[:1]
    numbers = {record.index for record in held}
    return held[:_HELD_TEXTS], [record for record in usable if record.index not in numbers] or held[1:]
