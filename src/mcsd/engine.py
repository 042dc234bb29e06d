"""The engine as users have it: models by name or object, texts and conversations in, completions and chunks out."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from mcsd.calibration import calibrated_plan
from mcsd.config import MAX_BATCH, EngineOptions, check_sampling_defaults, check_sizes, parse_tree, split_draft
from mcsd.core import EngineCore
from mcsd.defaults import model_defaults, unused_defaults
from mcsd.drafters import Drafter
from mcsd.drafters.make import cache_slots, make_drafter
from mcsd.errors import InvalidOption, InvalidParameter, McsdWarning, UnsupportedModel, check_int
from mcsd.inputs import as_conversations, as_prompts
from mcsd.models import DecoderModel, LanguageModel
from mcsd.models.compatibility import as_model, check_devices, check_length, is_network
from mcsd.notebook import table_html
from mcsd.params import SamplingParams
from mcsd.planning import FixedTree, LookUpPlan, Plan, Planner, ProfileStore, profile_file
from mcsd.progress import progress_bar
from mcsd.prompts import load_corpus
from mcsd.request import Request
from mcsd.request_queue import request_length
from mcsd.results import Chunk, Completion
from mcsd.tokenization import Message, Prompt
from mcsd.tree import TreeShape

_NO_DRAFT = (
    "without a draft, candidates are n-grams of the text so far, which rarely help: give draft=, or make one with"
    " `mcsd distill`; draft='ngram' silences this"
)


class Engine(EngineCore):
    """Generates with a target and a drafter; the output follows the target's distribution exactly.

    Args:
        target: a ``PreTrainedModel`` of transformers, or any `mcsd.models.LanguageModel`.
        draft: the same; the name or folder of a model or of a draft head; a `mcsd.models.BoundHead` or
            `mcsd.drafters.Drafter`; "ngram" (also None): n-grams of the text so far; "ngram:PATH": those of files too;
            or a draft and n-grams, as ``[draft, "ngram"]`` or "name+ngram".
        tokenizer: of the target; without one, prompts are token ids and there is no text.
        tree: anything `TreeShape.parse` reads; or "auto": the fastest tree by a calibration before the first request
            and by the acceptance rates since; or a `mcsd.planning.Plan`.
        scheme: a name in `mcsd.SCHEMES`. Candidates that are not sampled are verified as "top-k".
        max_batch: sequences that run together; further requests wait.
        max_length: the most tokens of a request, prompt included; at most the target's context, which is the default.
        sampling_defaults: where fields of sampling parameters that a request does not name come from: "model" (its
            generation config; mcsd's for what that leaves open) or "mcsd" (those of `SamplingParams`).
        optimize: run a target and draft of transformers as `load` runs them. The models compute what they did before.
            On a CPU, packed copies take memory of their own, in bfloat16 or int8; on a CUDA card, fused copies share
            their weights, and forwards are captured in CUDA graphs.
        prefix_cache: texts that are kept after their end, for prompts that begin like them; 0: none. They take at most
            1 GiB, and 1 GiB for a draft that is a model or head.
        profile: where the calibration of tree "auto" is kept. Without it every engine calibrates, and the tree that a
            seed pins may differ between engines.
        draft_tokenizer: of a draft model given as an object. If it is not the target's, the draft proposes the tokens
            that both have. To compare tokenizers that are not given, those beside the weights are read, if any.

    Raises:
        InvalidTree, UnknownScheme, InvalidOption: by name.
        VocabularyMismatch: target and draft share no tokens, or their sizes differ and a tokenizer is not known.
        UnsupportedModel: a target or draft that the engine cannot run, or that are on different devices.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        target: Any,
        draft: Any = None,
        tokenizer: Any | None = None,
        tree: str | Path | Sequence[int] | TreeShape | Plan = EngineOptions.tree,
        scheme: str = EngineOptions.scheme,
        max_batch: int = EngineOptions.max_batch,
        max_length: int | None = EngineOptions.max_length,
        sampling_defaults: str = EngineOptions.sampling_defaults,
        optimize: bool = False,
        prefix_cache: int = EngineOptions.prefix_cache,
        profile: ProfileStore | None = None,
        draft_tokenizer: Any | None = None,
    ) -> None:
        check_sizes(max_batch, max_length)
        check_int("prefix_cache", prefix_cache, 0, MAX_BATCH)
        check_sampling_defaults(sampling_defaults)
        for each in (tokenizer, draft_tokenizer):
            if isinstance(each, str | Path):
                raise InvalidOption(f"tokenizer {str(each)!r:.60} is a name", "give AutoTokenizer.from_pretrained(...)")
        shape = parse_tree(scheme, "auto" if isinstance(tree, Plan) else tree)
        plan: Plan | None = tree if isinstance(tree, Plan) else None if shape is None else FixedTree(shape)
        max_nodes = (plan or Planner).max_nodes
        draft, look_up = split_draft(draft, scheme)
        if not max_nodes and not isinstance(draft, Drafter):
            draft, look_up = None, "ngram"  # A draft model that no tree needs is not used.
        if draft is look_up is None and is_network(target):
            warnings.warn(_NO_DRAFT, McsdWarning, stacklevel=2)
        tokenizers = tokenizer, draft_tokenizer
        if is_network(draft):
            tokenizers = _tokenizer_of(target, tokenizer), _tokenizer_of(draft, draft_tokenizer)
        if optimize:
            target, draft = _optimized(target, draft, *tokenizers)
        model = as_model(target)
        if isinstance(draft, str | Path):
            draft = _load_draft(draft, model, tokenizer)
        check_devices(model, draft)
        check_length(max_length, model)
        length = request_length(max_length, model)
        slots = cache_slots(length, max_nodes)
        rest = tokenizers[1], prefix_cache, load_corpus(look_up, tokenizer) if look_up else None
        drafter = make_drafter(draft, model, tokenizers[0], max_batch, slots, *rest)
        config = getattr(model, "generation_config", None) if sampling_defaults == "model" else None
        self.model_defaults = model_defaults(config)
        defaults = SamplingParams(**self.model_defaults)
        sizes = max_batch, length
        super().__init__(
            model, drafter, scheme, plan, max_nodes, tokenizer, *sizes, defaults, config, max_texts=prefix_cache
        )
        self._warned_of_defaults = False
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
        max_length: int | None = EngineOptions.max_length,
        sampling_defaults: str = EngineOptions.sampling_defaults,
        prefix_cache: int = EngineOptions.prefix_cache,
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
            tree, scheme, max_batch, max_length, sampling_defaults, prefix_cache: as in the class.

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
                sampling_defaults=sampling_defaults,
                prefix_cache=prefix_cache,
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
        return cls(
            target.model,
            pair.both(options.draft),
            target.tokenizer,
            tree,
            options.scheme,
            *sizes,
            options.sampling_defaults,
            prefix_cache=options.prefix_cache,
            profile=profile,
        )

    def __repr__(self) -> str:
        return f"Engine({', '.join(f'{name}={value!r}' for name, value in self._description.items())})"

    def _repr_html_(self) -> str:
        return table_html("mcsd.Engine", self._description)

    @property
    def _description(self) -> dict[str, str | int]:
        return {
            "target": self.target_name,
            "draft": self.draft_name,
            "tree": str(self.plan.shape) if isinstance(self.plan, FixedTree) else "auto",
            "scheme": self.scheme_name,
            "max_batch": self.max_batch,
            "max_length": self.max_length,
        }

    @property
    def plain_seconds(self) -> float | None:
        """Seconds of a step without candidates for one sequence, as calibrated for tree "auto"; None without it."""
        return self.plan.plain_seconds if isinstance(self.plan, Planner | LookUpPlan) else None

    @property
    def draft_name(self) -> str:
        """The source of candidates; "none" if the engine decodes plainly."""
        plain = isinstance(self.plan, FixedTree) and not self.plan.max_nodes
        return "none" if plain else self.drafter.name

    def calibrate(self) -> None:
        """For tree "auto": read the profile of this pair and machine, or measure it, which takes some seconds.

        The first request does it if nothing else has.
        """
        self._step_lock.run(self._calibrate, unless=lambda: self.plan is not None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _calibrate(self) -> None:
        if self.plan is None:
            scheme, length = type(self._scheme).name, self.max_length
            self.plan = calibrated_plan(self.target, self.drafter, scheme, self.tokenizer, length, self._profile)

    def _step(self) -> None:
        if self._waiting:
            try:
                self._calibrate()
            except BaseException as error:
                # The drafter, which the measurement shares, may hold sequences of it.
                self._abort(error)
                raise
        super()._step()

    @overload
    def generate(self, prompts: str, params: Any = None, *, progress: bool = ..., **fields: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Any, params: Any = None, *, progress: bool = ..., **fields: Any) -> Any: ...
    def generate(self, prompts: Any, params: Any = None, *, progress: bool = False, **fields: Any) -> Any:
        """Complete one prompt, or many together. No chat template is applied: that is `chat`.

        A prompt with ``n > 1`` gets a list of completions in the place of one.

        Args:
            prompts: a text, or token ids as a list or tensor ``[n]`` (returns a `Completion`); a list of those, a
                tensor ``[B, n]``, or what a tokenizer returns, with its attention mask (returns a list, in order).
            params: `SamplingParams` or a transformers ``GenerationConfig``, which count whole; a dict of fields; or a
                list of these, one per prompt. The same seed gives the same text in any position.
            progress: whether a bar on stderr, or in the notebook, counts the requests that are done.
            fields: sampling parameters by name, such as ``temperature=0``. They, and a dict, replace single fields of
                the model's defaults.

        Raises:
            RequestError: a prompt or parameter is wrong; nothing has been generated. A request that fails later
                (`NonFiniteLogits`) is raised when all others have ended, with their ``completions``.
        """
        given, single = self._as_prompts(prompts)
        return self._complete(given, single, params, progress, fields)

    @overload
    def chat(
        self, messages: Sequence[Message], params: Any = None, *, progress: bool = ..., **fields: Any
    ) -> Completion: ...
    @overload
    def chat(self, messages: Any, params: Any = None, *, progress: bool = ..., **fields: Any) -> Any: ...
    def chat(self, messages: Any, params: Any = None, *, progress: bool = False, **fields: Any) -> Any:
        """Answer a conversation, or many together, in the model's chat template.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]`` (returns a `Completion`), or a list of such
                conversations (returns a list, in order).
            params, progress, fields: as in `generate`.
        """
        conversations, single = as_conversations(messages)
        return self._complete([self.chat_tokens(one) for one in conversations], single, params, progress, fields)

    def stream(self, prompt: Any, params: Any = None, *, trace: bool = False, **fields: Any) -> Iterator[Chunk]:
        """Complete one prompt, one chunk per step; the last chunk carries the completion.

        Closing the iterator cancels the request. Arguments are those of `generate`, and:

        Args:
            trace: whether chunks carry a `StepTrace`: the candidates with their p and q. It makes steps slower.
        """
        given, single = self._as_prompts(prompt)
        if not single and len(given) != 1:
            raise InvalidParameter(f"stream takes one prompt, not {len(given)}", "use generate, or one stream each")
        return self._start_stream(given[0], params, trace, fields)

    def stream_chat(
        self, messages: Sequence[Message], params: Any = None, *, trace: bool = False, **fields: Any
    ) -> Iterator[Chunk]:
        """`stream`, for a conversation."""
        (conversation, *others), _ = as_conversations(messages)
        if others:
            raise InvalidParameter("stream_chat takes one conversation", "use chat, or one stream each")
        return self._start_stream(self.chat_tokens(conversation), params, trace, fields)

    def chat_tokens(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """A conversation, and tools that the answer may call, as token ids, in the model's chat template."""
        return self.encoder.encode_chat(messages, tools)

    def _as_prompts(self, prompts: Any) -> tuple[list[Prompt], bool]:
        return as_prompts(prompts, getattr(self.tokenizer, "pad_token_id", None))

    def _complete(
        self, prompts: list[Prompt], single: bool, params: Any, progress: bool, fields: dict[str, Any]
    ) -> Any:
        """Run prompts to their end; one result if they were a single prompt: a `Completion`, or ``n > 1`` of them."""
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidParameter(f"{len(each)} sampling parameters for {len(prompts)} prompts", "give one per prompt")
        groups = [self.requests(prompt, one, **fields) for prompt, one in zip(prompts, each, strict=True)]
        if groups:
            self._warn_of_unused_defaults(each[0])
        requests = [request for group in groups for request in group]
        with progress_bar(len(requests), progress) as advance:
            done = iter(self.run(requests, advance))
        results = [next(done) if len(group) == 1 else [next(done) for _ in group] for group in groups]
        return results[0] if single else results

    def _warn_of_unused_defaults(self, params: Any) -> None:
        """Name the model's defaults that an explicit object leaves unused, once."""
        if not isinstance(params, SamplingParams) or self._warned_of_defaults:
            return
        unused = unused_defaults(params, self.model_defaults)
        if unused:
            self._warned_of_defaults = True
            warnings.warn(
                f"SamplingParams replaces all sampling defaults of {self.target_name}: {', '.join(unused)} not used"
                " (to keep them, name single fields, as in temperature=0.5)",
                McsdWarning,
                stacklevel=4,
            )

    def _start_stream(self, prompt: Prompt, params: Any, trace: bool, fields: dict[str, Any]) -> Iterator[Chunk]:
        request = self.request(prompt, params, **fields)
        request.trace = trace
        self._warn_of_unused_defaults(params)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[Chunk]:
        self.submit(request)
        try:
            while not request.done or request.chunks:
                self.run_until(lambda: request.has_chunk or request.done)
                while request.has_chunk:
                    yield request.chunks.popleft()
        finally:
            self.cancel(request)
        if request.error is not None:
            raise request.error


def _optimized(target: Any, draft: Any, tokenizer: Any | None, draft_tokenizer: Any | None) -> tuple[Any, Any]:
    """Packed copies of those of a target and draft that are models of transformers."""
    from mcsd.cpu.weight_plan import Role
    from mcsd.loading.load import optimize

    if is_network(target):
        target = optimize(target, tokenizer, Role.TARGET)
    if is_network(draft):
        draft = optimize(draft, draft_tokenizer, Role.DRAFT)
    return target, draft


def _tokenizer_of(model: Any, given: Any | None) -> Any | None:
    """The given tokenizer; without it the one beside the weights of a ``PreTrainedModel`` on this machine, if any."""
    from mcsd.loading.pretrained import find_tokenizer

    return find_tokenizer(str(model.config.name_or_path)) if given is None and is_network(model) else given


def _load_draft(draft: str | Path, target: LanguageModel, tokenizer: Any | None) -> Any:
    """A draft by name or folder, for a target given as an object."""
    from mcsd.loading.load import LoadedModel, load_draft

    if not isinstance(target, DecoderModel):
        raise UnsupportedModel(f"{target.name} takes no draft by name", "give the draft as an object")
    return load_draft(draft, LoadedModel(target, tokenizer))
