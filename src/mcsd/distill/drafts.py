"""The kinds of drafts: their initial weights, their training, and their files."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from mcsd.cpu.weight_plan import WeightPlan
from mcsd.distill.batches import Batch
from mcsd.distill.converted_head import converted_head, converted_layers
from mcsd.distill.corpus import Record
from mcsd.distill.head_learner import HeadLearner
from mcsd.distill.losses import LOSS_FUNCTIONS
from mcsd.distill.model_learner import ModelLearner, layer_stack, prune
from mcsd.distill.new_head import head_layers, new_head
from mcsd.distill.options import DistillOptions
from mcsd.distill.teacher import Teacher, most_frequent_tokens
from mcsd.distill.trainer import Learner
from mcsd.errors import InvalidOption
from mcsd.files import save_tensors, save_text, write_error
from mcsd.loading.load import LoadedModel, load
from mcsd.loading.published_heads import load_head
from mcsd.loading.speculators_format import save_eagle3_head
from mcsd.models.bound_head import check_target
from mcsd.models.compatibility import check_tokenizers, check_vocabularies
from mcsd.models.draft_head import CONFIG_FILE, WEIGHTS_FILE, DraftHead
from mcsd.models.draft_vocabulary import VOCABULARY_FILE
from mcsd.models.protocol import DecoderModel

_HEAD_VOCABULARY = 8192
"""Default draft vocabulary of a head; a model's is the full vocabulary."""

_MODEL_BATCH = 8
"""Texts per training step of a model."""

_HEAD_BATCH, _HEAD_SIZE = 16, 768
"""Texts per training step of a head, for each 768 of the hidden size, with which the optimizer's work grows."""

_HEAD_RATE_CONTINUED, _HEAD_RATE_CONVERTED = 0.1, 0.3
"""Factors of a head's learning rates if it continues a given head, and if it is converted from one."""

_RATE_GIVEN, _RATE_PRUNED = 1e-5, 1e-3
"""Learning rates of a given model, and of a pruned one."""

_BATCHES_GIVEN = 4
"""Batches per step for a given model."""


class Draft(Protocol):
    """A draft to be trained. Making one loads and checks its initial weights, if they are given.

    Attributes:
        hidden_layers: of the target, whose hidden states training reads; those of the last layer come last.
        batch_size: texts per training step.
    """

    hidden_layers: tuple[int, ...]
    batch_size: int

    def start(self, target: DecoderModel, records: Sequence[Record], sample: Batch) -> tuple[Learner, Teacher]:
        """Its learner, and the teacher of that.

        Args:
            target: the model that it drafts for.
            records: training texts.
            sample: some of them with the target's hidden states.
        """
        ...

    def save(self, out: Path) -> None:
        """Write it in bfloat16; its configuration last, so that a folder with one is complete.

        Raises:
            OutputFailed: a file cannot be written.
        """
        ...


def make_draft(options: DistillOptions, target: LoadedModel) -> Draft:
    """The draft that options describe.

    Raises:
        ModelError: the draft to start from cannot be loaded, or does not fit the target.
        InvalidOption: it is of another kind, or has too few layers.
    """
    return ModelDraft(options, target) if options.kind == "model" else HeadDraft(options, target.model)


class HeadDraft:
    """A draft head, new or given."""

    def __init__(self, options: DistillOptions, target: DecoderModel) -> None:
        self._options = options
        self._target_config: Any = target.config
        self._initial = None if options.init is None else _given_head(options, target)
        if self._initial is None:
            read = head_layers(options.kind, target.num_layers)
        elif self._is_converted:
            read = converted_layers(self._initial, target.num_layers)
        else:
            read = self._initial.config.hidden_layers
        self.hidden_layers = (*(layer for layer in read if layer != -1), -1)
        self.batch_size = _HEAD_BATCH * max(1, target.config.hidden_size // _HEAD_SIZE)

    def start(self, target: DecoderModel, records: Sequence[Record], sample: Batch) -> tuple[Learner, Teacher]:
        """See `Draft.start`."""
        options, given = self._options, self._initial
        if given is not None:
            given = given.to(target.device).float()
        known = torch.arange(target.vocab_size) if given is None else given.vocabulary.cpu()
        size = options.vocab or (_HEAD_VOCABULARY if given is None else len(known))
        teacher = Teacher(target, most_frequent_tokens(records, size, known, target.eos_token_ids))
        if given is None:
            last = sample.hidden_states.flatten(0, 1)[sample.positions, -teacher.hidden_size :]
            head, rate = new_head(options.kind, target, options.target, options.layers or 1, teacher, last), 1.0
        elif self._is_converted:
            head, rate = converted_head(given, self.hidden_layers[:-1], teacher, sample), _HEAD_RATE_CONVERTED
        else:
            head, rate = given, _HEAD_RATE_CONTINUED
        loss = LOSS_FUNCTIONS[options.loss]
        self._learner = HeadLearner(head, teacher, loss, options.steps_ahead, given is not None, sample, rate)
        return self._learner, teacher

    @property
    def _is_converted(self) -> bool:
        """Whether an EAGLE-3 head starts from a head of kind "mcsd"."""
        return self._options.kind == "eagle3" and self._initial is not None and self._initial.config.kind == "mcsd"

    def save(self, out: Path) -> None:
        """See `Draft.save`."""
        head = self._learner.finish()
        if self._options.kind == "eagle3":
            save_eagle3_head(out, head, self._options.target, self._target_config, self._options.steps_ahead)
            return
        tensors = {
            name: tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in head.state_dict().items()
        }
        save_tensors(out / WEIGHTS_FILE, tensors)
        save_text(out / CONFIG_FILE, replace(head.config, target=self._options.target).to_json())


def _given_head(options: DistillOptions, target: DecoderModel) -> DraftHead:
    """The head to start from: of the same kind; or of kind "mcsd", which becomes an EAGLE-3 head."""
    assert options.init is not None
    head, is_eagle3 = load_head(options.init, target), options.kind == "eagle3"
    kinds = ("eagle3", "mcsd") if is_eagle3 else ("mcsd",)
    if head is None or head.config.kind not in kinds:
        found = "a language model" if head is None else f"a head of kind {head.config.kind}"
        raise InvalidOption(f"init {options.init} is {found}, not a head of kind {' or '.join(kinds)}", "change --kind")
    check_target(head.config, target, options.init)
    if options.vocab and head.config.kind == options.kind:
        raise InvalidOption("an EAGLE-3 head keeps its vocabulary", "leave out vocab")
    return head


class ModelDraft:
    """A small model: given, or the target with fewer layers."""

    def __init__(self, options: DistillOptions, target: LoadedModel) -> None:
        self._options = options
        initial = load(options.init or options.target, target.model.device, WeightPlan(torch.float32))
        check_vocabularies(target.model, initial.model, target.tokenizer)
        check_tokenizers(target.model, target.tokenizer, initial.model, initial.tokenizer)
        self._num_layers = options.layers or (None if options.init else max(1, initial.model.num_layers // 8))
        if self._num_layers:
            layer_stack(initial.model.weights, self._num_layers)
        self._initial = initial
        # Stored are those of a head, so that one can be trained on the same text.
        is_stored = options.hidden_states == "stored"
        self.hidden_layers = head_layers("head", target.model.num_layers) if is_stored else (-1,)
        self.batch_size = _MODEL_BATCH

    def start(self, target: DecoderModel, records: Sequence[Record], sample: Batch) -> tuple[Learner, Teacher]:
        """See `Draft.start`."""
        options, network = self._options, self._initial.model.weights
        # If the vocabularies differ in padding, only the tokens of both.
        known = min(target.vocab_size, self._initial.model.vocab_size)
        tokens = torch.arange(known)
        teacher = Teacher(target, most_frequent_tokens(records, options.vocab or known, tokens, target.eos_token_ids))
        if self._num_layers:
            prune(network, self._num_layers)
        rate, batches_per_step = (_RATE_PRUNED, 1) if self._num_layers else (_RATE_GIVEN, _BATCHES_GIVEN)
        self._vocabulary: Tensor | None = teacher.vocabulary if options.vocab else None
        return ModelLearner(network, teacher, LOSS_FUNCTIONS[options.loss], rate, batches_per_step), teacher

    def save(self, out: Path) -> None:
        """See `Draft.save`."""
        network: Any = self._initial.model.weights
        tokenizer = self._initial.tokenizer
        if self._vocabulary is not None:
            save_tensors(out / VOCABULARY_FILE, {"vocabulary": self._vocabulary})
        try:
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as part:
                network.to(torch.bfloat16).save_pretrained(part)
                if tokenizer is not None:
                    tokenizer.save_pretrained(part)
                for file in sorted(Path(part).iterdir(), key=lambda file: file.name == CONFIG_FILE):
                    os.replace(file, out / file.name)
        except (OSError, SafetensorError) as error:
            raise write_error(out, error) from error
