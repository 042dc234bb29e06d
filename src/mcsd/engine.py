"""The engine as users have it: models by name or object, texts and conversations in, completions and chunks out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from mcsd.calibration import calibrated_plan
from mcsd.config import EngineOptions, check_sizes, parse_tree
from mcsd.core import EngineCore, cache_slots
from mcsd.drafters import Drafter
from mcsd.drafters.make import make_drafter
from mcsd.errors import InvalidParameter
from mcsd.models.compatibility import as_model
from mcsd.params import Chunk, Completion, SamplingParams
from mcsd.planning import FixedTree, Plan, Planner, ProfileFile, profile_file
from mcsd.request import Request
from mcsd.tokenization import Message, Prompt, Prompts
from mcsd.tree import TreeShape


class Engine(EngineCore):
    """Generates with a target and a drafter; the output follows the target's distribution exactly.

    Args:
        target: a ``PreTrainedModel`` of transformers, or any `mcsd.models.LanguageModel`.
        draft: the same, a `mcsd.models.BoundHead`, a `mcsd.drafters.Drafter`, or "ngram" (also None): n-grams of the
            text so far.
        tokenizer: of the target; without one, prompts are token ids and there is no text.
        tree: anything `TreeShape.parse` reads; or "auto": the fastest tree by a calibration before the first request
            and by the acceptance rates since; or a `mcsd.planning.Plan`.
        scheme: a name in `mcsd.SCHEMES`. Candidates that are not sampled are verified as "top-k".
        max_batch: sequences that run together; further requests wait.
        max_length: the most tokens of a request, prompt included; at most the target's context.
        profile: where the calibration of tree "auto" is kept. Without it every engine calibrates, and the tree that a
            seed pins may differ between engines.

    Raises:
        InvalidTree, UnknownScheme, InvalidOption: by name.
        VocabularyMismatch: target and draft do not share tokens.
        UnsupportedModel: a target or draft that the engine cannot run.
    """

    def __init__(
        self,
        target: Any,
        draft: Any = None,
        tokenizer: Any | None = None,
        tree: str | Path | Sequence[int] | TreeShape | Plan = EngineOptions.tree,
        scheme: str = EngineOptions.scheme,
        max_batch: int = EngineOptions.max_batch,
        max_length: int = EngineOptions.max_length,
        profile: ProfileFile | None = None,
    ) -> None:
        check_sizes(max_batch, max_length)
        shape = parse_tree(scheme, "auto" if isinstance(tree, Plan) else tree)
        plan: Plan | None = tree if isinstance(tree, Plan) else None if shape is None else FixedTree(shape)
        model = as_model(target)
        length = min(max_length, model.max_length or max_length)
        max_nodes = (plan or Planner).max_nodes
        # A draft model that no tree needs is not used.
        proposer = draft if max_nodes or isinstance(draft, Drafter) else "ngram"
        drafter = make_drafter(proposer, model, tokenizer, max_batch, cache_slots(length, max_nodes))
        super().__init__(model, drafter, scheme, plan, max_nodes, tokenizer, max_batch, length)
        if shape is not None:
            self.tree = shape
        self._profile = profile

    @classmethod
    def load(
        cls,
        target: str | Path = EngineOptions.target,
        draft: str | Path | None = EngineOptions.draft,
        tree: str | Path | Sequence[int] | TreeShape = EngineOptions.tree,
        scheme: str = EngineOptions.scheme,
        device: str = EngineOptions.device,
        dtype: str = EngineOptions.dtype,
        quantize: str | None = EngineOptions.quantize,
        compile: bool = EngineOptions.compile,
        max_batch: int = EngineOptions.max_batch,
        max_length: int = EngineOptions.max_length,
    ) -> "Engine":
        """Load models by name, path, GGUF file or hub id and make an engine of them.

        Args:
            target, draft: a name that `mcsd models` lists, a folder, a GGUF file, or a hub id. ``draft`` may be
                "ngram"; None: the target's default draft, else "ngram". A draft that no tree needs is not loaded.
            device: "auto", "cpu", "cuda", ...
            dtype: "auto", "float32", "bfloat16", "float16".
            quantize: None, or "int8": the weights of target and draft are quantized. The output then follows the
                distribution of the quantized target exactly, which differs slightly from the original target's.
            compile: has no effect yet, and a warning says so.
            tree, scheme, max_batch, max_length: as in the class.

        Raises:
            UnknownModel, WeightsCorrupt, DownloadFailed, UnsupportedModel, VocabularyMismatch: about the models.
            InvalidOption, InvalidTree, UnknownScheme: about the options; before any weights are read.
        """
        return cls.from_options(
            EngineOptions(
                target=target,
                draft=draft,
                device=device,
                dtype=dtype,
                quantize=quantize,
                compile=compile,
                tree=tree,
                scheme=scheme,
                max_batch=max_batch,
                max_length=max_length,
            )
        )

    @classmethod
    def from_options(cls, options: EngineOptions) -> "Engine":
        """`load`, for options that are checked already."""
        from mcsd.loading.load import load_pair

        shape = parse_tree(options.scheme, options.tree)
        pair = load_pair(options, with_draft=shape is None or len(shape) > 0)
        target = pair.target
        profile = profile_file(target.model, pair.draft, options.scheme) if shape is None else None
        tree = "auto" if shape is None else shape
        sizes = options.max_batch, options.max_length
        return cls(target.model, pair.draft, target.tokenizer, tree, options.scheme, *sizes, profile)

    @property
    def draft_name(self) -> str:
        """The source of candidates; "none" if the engine decodes plainly."""
        plain = isinstance(self.plan, FixedTree) and not self.plan.max_nodes
        return "none" if plain else self.drafter.name

    @torch.no_grad()
    def calibrate(self) -> None:
        """For tree "auto": read the profile of this pair and machine, or measure it, which takes some seconds.

        The first request does it if nothing else has.
        """
        if self.plan is None:
            scheme, length = type(self._scheme).name, self.max_length
            self.plan = calibrated_plan(self.target, self.drafter, scheme, self.tokenizer, length, self._profile)

    def step(self) -> None:
        """See `EngineCore.step`."""
        if self._waiting:
            try:
                self.calibrate()
            except BaseException:
                # The drafter, which the measurement shares, may hold sequences of it.
                self._abort()
                raise
        super().step()

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None) -> Completion: ...
    @overload
    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: str | Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """Complete one prompt, or many together.

        Args:
            prompts: a text (returns a `Completion`), or a list of texts or of token id lists (returns a list, in
                order).
            params: for all prompts, or one per prompt. The same seed gives the same text in any position.

        Raises:
            RequestError: a prompt or parameter is wrong; nothing has been generated. A request that fails later
                (`NonFiniteLogits`) is raised when all others have ended, with their ``completions``.
        """
        if isinstance(prompts, str):
            return self.run([self.request(prompts, params)])[0]  # type: ignore[arg-type]
        if not isinstance(prompts, Sequence):
            raise InvalidParameter(
                f"prompts {prompts!r:.40} are not a list", "give a text, a list of texts, or of lists"
            )
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidParameter(f"{len(each)} sampling parameters for {len(prompts)} prompts", "give one per prompt")
        return self.run([self.request(prompt, p) for prompt, p in zip(prompts, each, strict=True)])

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation: ``[{"role": "user", "content": "..."}, ...]``, in the model's chat template."""
        return self.run([self.request(self.chat_tokens(messages), params)])[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Complete one prompt, one chunk per step; the last chunk carries the completion.

        Closing the iterator cancels the request.
        """
        return self._stream(self.request(prompt, params))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Chunk]:
        """`stream`, for a conversation."""
        return self._stream(self.request(self.chat_tokens(messages), params))

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, in the model's chat template, with the prompt for the answer."""
        return self.encoder.encode_chat(messages)

    def _stream(self, request: Request) -> Iterator[Chunk]:
        self.submit(request)
        try:
            while not request.done or request.chunks:
                while request.chunks:
                    yield request.chunks.popleft()
                if not request.done:
                    self.step()
        finally:
            self.cancel(request)
        if request.error is not None:
            raise request.error
