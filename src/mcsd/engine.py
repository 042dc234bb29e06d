"""The engine: rows of requests, stepped together. Draft, verify, judge, commit, emit.

The engine is the only place where drafter, target and scheme meet. It is free of globals; one thread drives it.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from mcsd.drafters import TOGETHER, Drafter, HeadDrafter, ModelDrafter, NgramDrafter
from mcsd.encoding import Encoder, Message, Prompt, Prompts
from mcsd.errors import (
    InvalidParameter,
    InvalidTree,
    NonFiniteLogits,
    RequestError,
    RequestInterrupted,
)
from mcsd.kernels import suits
from mcsd.models import Block, BoundHead
from mcsd.models.compatibility import as_model, check_bound, check_vocabularies
from mcsd.models.prefill import prefill
from mcsd.options import check_options
from mcsd.params import Chunk, Completion, SamplingParams
from mcsd.planning import (
    Calibration,
    FixedTree,
    Outcome,
    Place,
    Plan,
    Planner,
    Profile,
    forward_curve,
    place_of,
    try_trees,
)
from mcsd.prompts import usual
from mcsd.request import Request
from mcsd.rng import DRAW, JUDGE, Streams
from mcsd.sampling import Settings
from mcsd.schemes import SCHEMES, CandidateTree, Scheme, Texts, Verdict
from mcsd.tree import TreeShape

_MEASURED_LENGTH = 512
"""The most tokens of a text that is written to measure what tree "auto" needs."""


class Engine:
    """Generates with a target and a drafter; the output follows the target's distribution exactly.

    Args:
        target: a ``PreTrainedModel`` of transformers, or any `mcsd.models.LanguageModel`.
        draft: the same, a `mcsd.models.BoundHead`, a `mcsd.drafters.Drafter`, or "ngram" (also None): look-up in the
            text so far.
        tokenizer: of the target; without one, prompts are token ids and there is no text.
        tree: anything `TreeShape.parse` reads; or "auto": the tree that pays, by what is measured before the first
            request and by what is accepted later on; or a `mcsd.planning.Plan` of your own.
        scheme: a name in `mcsd.SCHEMES`. Candidates of a drafter that does not draw are judged as "top-k".
        max_batch: rows that run together; further requests wait.
        max_length: the most tokens of a request, prompt included; at most the target's context.
        profile: where the measurements of tree "auto" are kept; without it every engine makes its own, and so the tree
            that a seed pins may be another one in each.

    Raises:
        InvalidTree, UnknownScheme, InvalidOption: by name.
        VocabularyMismatch: target and draft cannot share tokens.
        UnsupportedModel: a target or draft that the engine cannot run.
    """

    def __init__(
        self,
        target: Any,
        draft: Any = None,
        tokenizer: Any | None = None,
        tree: str | Path | Sequence[int] | TreeShape | Plan = "auto",
        scheme: str = "mcss-wor",
        max_batch: int = 8,
        max_length: int = 2048,
        profile: Place | None = None,
    ) -> None:
        plan = tree if isinstance(tree, Plan) else None
        shape = check_options(scheme, "auto" if isinstance(tree, Plan) else tree, max_batch, max_length)
        self.target = as_model(target)
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_length = min(max_length, self.target.max_length or max_length)
        self.tree = TreeShape.parse("none") if shape is None else shape
        """Of the last step; before the first one the tree that was named, or none."""
        self._plan = plan if shape is None else FixedTree(shape)
        self._profile = profile
        self.levels = 0
        """Levels of candidates that all steps so far have drafted."""
        # A draft reads two tokens of a text before the candidates, or after plain decoding some more.
        slots = self.max_length + 2 + max(TOGETHER, (self._plan or Planner).largest)
        self._cache = self.target.new_cache(max_batch, slots)
        self.drafter: Drafter
        if isinstance(draft, Drafter):
            self.drafter = draft
        elif draft is None or draft == "ngram" or (shape is not None and not len(shape)):
            self.drafter = NgramDrafter(self.target.device)
        elif isinstance(draft, BoundHead):
            check_bound(self.target, draft)
            self.drafter = HeadDrafter(draft, max_batch, slots)
        else:
            model = as_model(draft)
            check_vocabularies(self.target, model, tokenizer)
            self.drafter = ModelDrafter(model, self.target.vocab_size, max_batch, slots)
        chosen = SCHEMES[scheme]
        self._scheme: Scheme = SCHEMES["top-k"]() if chosen.needs_q and not self.drafter.draws else chosen()
        self.encoder = Encoder(tokenizer, self.target.name, self.target.vocab_size, self.max_length)
        eos = getattr(tokenizer, "eos_token_id", None)
        self._eos = self.target.eos_token_ids | (frozenset() if eos is None else {eos})
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []
        self._settings: Settings | None = None
        self._streams = Streams(torch.empty(0, dtype=torch.int64))
        # Whatever has to be compiled is compiled now, not in the first request's time.
        suits(torch.empty(1, self.target.vocab_size, device=self.target.device))
        self._clock = dict.fromkeys(("prefill", "draft", "target", "judge", "commit", "other"), 0.0)
        self._since = 0.0

    @classmethod
    def load(
        cls,
        target: str | Path = "smollm2-135m",
        draft: str | Path | None = None,
        tree: str | Path | Sequence[int] | TreeShape = "auto",
        scheme: str = "mcss-wor",
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        compile: bool = False,
        max_batch: int = 8,
        max_length: int = 2048,
    ) -> "Engine":
        """Load models by name, path, GGUF file or hub id and make an engine of them.

        Args:
            target, draft: what `mcsd models` lists, a folder, a GGUF file, or a hub id. ``draft`` may be "ngram";
                None takes the target's default draft, else "ngram". A draft that no tree needs is not loaded.
            device: "auto", "cpu", "cuda", ...
            dtype: "auto", "float32", "bfloat16", "float16".
            quantize: None, or "int8": the weights of target and draft are rounded. The law is then exactly that of the
                rounded target, which is not quite the law of the target as it was.
            compile: whether to compile target and draft: some ten seconds the first time, a few afterwards. What cannot
                be compiled runs as it is, and a warning says why.
            tree, scheme, max_batch, max_length: as in the class; a plan is for engines that are made of objects.

        Raises:
            UnknownModel, WeightsCorrupt, DownloadFailed, UnsupportedModel, VocabularyMismatch: about the models.
            InvalidOption, InvalidTree, UnknownScheme: about the options.
        """
        from mcsd.catalog import default_draft
        from mcsd.models.loading import load_pair

        # What is wrong with the options is said before the weights are read.
        shape = check_options(scheme, tree, max_batch, max_length)
        draft = default_draft(target) if draft is None else draft
        needed = draft if shape is None or len(shape) else "ngram"
        loaded, proposer = load_pair(target, needed, device, dtype, quantize, compile)
        profile = None
        if shape is None:
            profile = place_of(target, draft, loaded.model, scheme=scheme, quantize=quantize, compile=compile)
        tree = "auto" if shape is None else shape
        return cls(loaded.model, proposer, loaded.tokenizer, tree, scheme, max_batch, max_length, profile)

    @property
    def scheme_name(self) -> str:
        """The scheme that judges."""
        return self._scheme.name

    @property
    def draft_name(self) -> str:
        """Where candidates come from; "none" when decoding plainly."""
        plain = isinstance(self._plan, FixedTree) and not self._plan.largest
        return "none" if plain else self.drafter.name

    @property
    def target_name(self) -> str:
        """The target."""
        return self.target.name

    @property
    def token_bytes(self) -> int:
        """What a forward of the target reads of keys and values for each token of the text."""
        return self._cache.token_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of all steps so far, by part."""
        return dict(self._clock)

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
            prompts: a text (a `Completion` comes back), or a list of texts or of token id lists (a list comes back,
                in order).
            params: for all prompts, or one for each. The same seed gives the same text wherever the prompt stands.

        Raises:
            RequestError: a prompt or parameter is wrong; nothing has been generated then. A request that fails on
                its way (`NonFiniteLogits`) is raised once all the others have ended, with their ``completions``.
        """
        if isinstance(prompts, str):
            return self._run([self.request(prompts, params)])[0]
        if not isinstance(prompts, Sequence):
            raise InvalidParameter(f"prompts {prompts!r:.40} are no list", "give a text, a list of texts, or of lists")
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidParameter(f"{len(each)} sampling parameters for {len(prompts)} prompts", "give one for each")
        return self._run([self.request(prompt, p) for prompt, p in zip(prompts, each, strict=True)])

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation: ``[{"role": "user", "content": "..."}, ...]``, in the model's chat template."""
        return self._run([self.request(self.chat_tokens(messages), params)])[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Complete one prompt, a chunk for each step; the last chunk carries the completion.

        Giving the iterator up ends the request.
        """
        return self._stream(self.request(prompt, params))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Chunk]:
        """As `stream`, for a conversation."""
        return self._stream(self.request(self.chat_tokens(messages), params))

    def submit(self, request: Request) -> None:
        """Let a request wait for a free row."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request that is waiting or running, with `RequestInterrupted`; its row is free at once."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._rows:
            self._free(self._rows.index(request))
        if not request.done:
            request.error = RequestInterrupted("the request was cancelled", "submit it again")

    @torch.no_grad()
    def prepare(self) -> None:
        """For tree "auto": read what is known of this pair and machine, or measure it on texts that the target writes.

        That takes some seconds. A first request does it if nobody has.
        """
        if self._plan is not None:
            return
        scheme = type(self._scheme)
        profile = self._profile.read(scheme) if self._profile else None
        if profile is None:
            profile = self._measured()
            if self._profile and profile:
                # Another process may have been faster, and served texts by what it found.
                known = self._profile.read(scheme)
                if known is None:
                    self._profile.keep(profile)
                profile = known or profile
        # Where target or draft give no distribution, the request that waits has to say so.
        self._plan = Planner(profile, scheme) if profile else FixedTree(TreeShape.parse("1"))

    @torch.no_grad()
    def step(self) -> None:
        """Advance every row by at least one token. Requests take what was emitted for them.

        Whatever breaks a step off (Ctrl-C, no memory) ends the running requests with `RequestInterrupted`, because
        their caches may be ahead of their texts. Waiting requests stay, and the engine goes on.
        """
        try:
            if self._waiting:
                self.prepare()
            self._since = time.perf_counter()
            self._admit()
            if not self._rows:
                return
            before = dict(self._clock)
            tree = self._draft()
            logits, hidden = self._verify(tree)
            verdict = self._judge(tree, logits)
            self._commit(verdict, hidden)
            self._lap("commit")
            self._learn(tree, verdict, before)
            self._emit(tree, verdict, logits)
        except BaseException:
            self._abandon()
            raise
        self._lap("other")

    def _admit(self) -> None:
        # Prompts that begin together and are the same are read once.
        begun: dict[tuple[int, ...], tuple[int, Tensor | None]] = {}
        while self._waiting and len(self._rows) < self.max_batch:
            request = self._waiting.popleft()
            self._lap("other")
            request.clock = dict(self._clock)
            self._rows.append(request)
            self._settings = None
            like, hidden = begun.get(tuple(request.prompt), (None, None))
            row = self._cache.add(like)
            if like is None:
                hidden = prefill(self.target, self._cache, row, request.prompt[:-1], self.drafter.hidden)
                begun[tuple(request.prompt)] = row, hidden
            self.drafter.add(request.prompt, hidden)
            self._lap("prefill")
        assert self._cache.used == len(self._rows)
        if self._settings is None:
            self._settings = Settings.of([row.params for row in self._rows], self.target.device)
            seeds = torch.tensor([row.seed for row in self._rows], device=self.target.device)
            self._streams = Streams(seeds)
        self._positions = [len(row.tokens) for row in self._rows]

    def _draft(self) -> CandidateTree:
        assert self._settings is not None
        assert self._plan is not None
        shape = self._plan.choose(self._settings.params)
        if shape != self.tree:
            self._check(shape)
            self.tree = shape
        texts = [row.all_tokens for row in self._rows]
        random = self._streams.at(self._positions, DRAW)
        self._lap("other")
        if len(shape):
            self.drafter.read(texts)
            self._lap("prefill")
        tree = self.drafter.draft(texts, self.tree, self._scheme, self._settings, random)
        self.levels += tree.shape.depth
        self._lap("draft")
        return tree

    def _check(self, shape: TreeShape) -> None:
        """Whether a plan may name a tree: schemes would judge some trees by another law than the target's."""
        assert self._plan is not None
        type(self._scheme).check(shape)
        if len(shape) > self._plan.largest:
            raise InvalidTree(
                f"the plan names a tree of {len(shape)} nodes, where it had said {self._plan.largest} at most",
                "raise its `largest`",
            )

    def _verify(self, tree: CandidateTree) -> tuple[Tensor, Tensor | None]:
        roots = torch.tensor([[row.all_tokens[-1]] for row in self._rows], device=self.target.device)
        tokens = torch.cat([roots, tree.tokens], dim=1)
        output = self.target.forward(tokens, Block.tree(tree.shape), self._cache, hidden=self.drafter.hidden)
        self._lap("target")
        return output.logits, output.hidden

    def _judge(self, tree: CandidateTree, logits: Tensor) -> Verdict:
        assert self._settings is not None
        texts = Texts([row.prompt for row in self._rows], [row.tokens for row in self._rows])
        random = self._streams.at(self._positions, JUDGE)
        verdict = self._scheme.judge(tree, logits, self._settings, texts, random)
        self._lap("judge")
        return verdict

    def _commit(self, verdict: Verdict, hidden: Tensor | None) -> None:
        columns = torch.nn.functional.pad(verdict.path + 1, (1, 0), value=0)
        self._cache.commit(columns, verdict.accepted + 1)
        if hidden is not None:
            hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        self.drafter.commit(verdict.path, verdict.accepted, hidden)

    def _learn(self, tree: CandidateTree, verdict: Verdict, before: dict[str, float]) -> None:
        assert self._settings is not None
        assert self._plan is not None
        paths = [path[:count] for path, count in zip(verdict.path.tolist(), verdict.accepted.tolist(), strict=True)]
        spent = {part: seconds - before[part] for part, seconds in self._clock.items()}
        self._plan.observe(Outcome(tree.shape, self._settings.params, paths, spent))

    def _measured(self) -> Profile | None:
        """Measure, in an engine of one row; None where target or draft give no distribution."""
        trial = Calibration(type(self._scheme), self.drafter.draws)
        length = min(self.max_length, _MEASURED_LENGTH)
        engine = Engine(self.target, self.drafter, self.tokenizer, trial, self.scheme_name, 1, length)
        try:
            prompts = usual(self.encoder)
        except RequestError:
            # There is no tokenizer, its template refuses them, or they are longer than a request may be.
            prompts = [[0]]
        try:
            try_trees(trial, prompts, length, lambda text, params: engine.generate([text], params)[0].token_ids)
        except NonFiniteLogits:
            return None
        return trial.profile(forward_curve(self.target, self.drafter.hidden))

    def _emit(self, tree: CandidateTree, verdict: Verdict, logits: Tensor) -> None:
        tokens, paths, last = tree.tokens.tolist(), verdict.path.tolist(), verdict.token.tolist()
        valid, failed, accepted = tree.valid.tolist(), verdict.failed.tolist(), verdict.accepted.tolist()
        # From the last row to the first: a freed row is filled from the end, by a row that has been seen.
        for i in range(len(self._rows) - 1, -1, -1):
            request, count = self._rows[i], accepted[i]
            new = [tokens[i][node] for node in paths[i][:count]] + ([] if failed[i] else [last[i]])
            chosen = None
            if request.params.logprobs is not None:
                chosen = logits[i, [0, *(verdict.path[i, :count] + 1).tolist()]]
            reason = request.take(new, count, sum(valid[i]), chosen) if new else None
            if failed[i] and not reason:
                request.error = NonFiniteLogits(
                    f"the model gave no distribution after {len(request.all_tokens)} tokens (NaN or infinite logits)",
                    "try dtype float32; if it stays, the weights are broken",
                )
                self._free(i)
            elif reason:
                self._lap("other")
                spent = {part: self._clock[part] - request.clock[part] for part in self._clock}
                # What is told of a request has five parts.
                spent["other"] += spent.pop("commit")
                request.finish(reason, spent)
                self._free(i)

    def _free(self, row: int) -> None:
        self._cache.remove(row)
        self.drafter.remove(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        self._settings = None

    def _abandon(self) -> None:
        for request in self._rows:
            if not request.done:
                request.error = RequestInterrupted("a step of the engine was broken off", "submit the request again")
        self._rows.clear()
        self._settings = None
        self._cache.clear()
        self.drafter.clear()

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self._clock[part] += now - self._since
        self._since = now

    def _run(self, requests: list[Request]) -> list[Completion]:
        for request in requests:
            self.submit(request)
        try:
            for request in requests:
                while not request.done:
                    self.step()
        finally:
            for request in requests:
                self.cancel(request)
        for request in requests:
            if isinstance(request.error, RequestError):
                request.error.completions = tuple(other.completion for other in requests)
                raise request.error
        return [request.completion for request in requests if request.completion is not None]

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

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, in the model's chat template, ready for the answer."""
        return self.encoder.chat(messages)

    def request(self, prompt: Prompt, params: Any = None) -> Request:
        """A prompt, with its `SamplingParams`, made ready for `submit`.

        Raises:
            RequestError: the prompt or a parameter is wrong.
        """
        params = SamplingParams() if params is None else params
        ids = self.encoder.encode(prompt, params)
        return Request(ids, params, self.max_length - len(ids), self.tokenizer, self._eos)
