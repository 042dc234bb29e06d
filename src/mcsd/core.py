"""The engine core: a batch of requests, stepped together. Draft, score, verify, commit, emit.

The core is the only place where drafter, target and scheme meet. The tree of each step comes from a plan. It has no
globals. Several threads may use it: one at a time steps it, for the requests of all.
"""

from typing import Any

import torch
from torch import Tensor

from mcsd import kernels
from mcsd.batch import Batch
from mcsd.drafters import Drafter, with_look_up
from mcsd.errors import InvalidParameter, step_error
from mcsd.graphs import GraphCache, Outputs, on_host
from mcsd.models import LanguageModel, TokenLayout
from mcsd.models.prefill import prefill
from mcsd.models.prefix_cache import TextsByBeginning, longest_common
from mcsd.params import SamplingParams
from mcsd.planning.plan import Plan, StepOutcome, check_planned
from mcsd.request import Request, StartedText, token_logprobs
from mcsd.results import TokenLogprobs
from mcsd.rng import DRAW, SAMPLE, VERIFY, PhiloxStream, PhiloxStreams
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES, CandidateTree, Scheme, TokenHistory, VerificationResult, VerifiedSequence
from mcsd.schemes.registry import REGISTRY
from mcsd.step_trace import StepTrace
from mcsd.timing import StepClock
from mcsd.tracing import trace_trees, with_path
from mcsd.tree import PLAIN, TreeShape


class EngineCore(Batch):
    """Steps a batch of requests with a target, a drafter and a scheme; the output follows the target's distribution.

    Args:
        target: the target.
        drafter: proposes candidates.
        scheme: a name in `mcsd.SCHEMES`; "top-k" verifies candidates that were not sampled.
        plan: names the tree of each step; it may be set later, before the first step.
        max_nodes: of the largest tree that the plan may name.
        tokenizer: of the target; without one, prompts are token ids and there is no text.
        max_batch: sequences that run together; further requests wait.
        max_length: the most tokens of a request, prompt included; at most the target's context, which is the default.
        defaults: sampling parameters of requests that have none of their own.
        generation_config: of the model, whose constraints hold for all requests; see `mcsd.generation_config`.
        max_texts: of the prefix cache; 0: none.

    Attributes:
        clock: the wall time of its steps.
        graphs: the captured forwards of the target, and verifications.
        tree: of the last step.
        draft_levels: levels of candidates that all steps so far have drafted.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        target: LanguageModel,
        drafter: Drafter,
        scheme: str,
        plan: Plan | None,
        max_nodes: int,
        tokenizer: Any | None = None,
        max_batch: int = 1,
        max_length: int | None = None,
        defaults: SamplingParams | None = None,
        generation_config: Any = None,
        max_texts: int = 0,
    ) -> None:
        super().__init__(
            target,
            drafter,
            max_batch=max_batch,
            max_length=max_length,
            max_nodes=max_nodes,
            max_texts=max_texts,
            tokenizer=tokenizer,
            defaults=defaults,
            generation_config=generation_config,
        )
        self.plan = plan
        self.tree = PLAIN
        self.draft_levels = 0
        self.graphs = GraphCache(target.device, getattr(target, "captures", False))
        self._matching: Scheme = SCHEMES["top-k"]()
        chosen = SCHEMES[scheme]
        self._scheme = self._step_scheme = self._matching if chosen.needs_q and not drafter.is_sampled else chosen()
        self._sampling = BatchSamplingParams.of([], target.device)
        self._streams = PhiloxStreams(torch.empty(0, dtype=torch.int64))
        self.clock = StepClock(target.device)
        if target.device.type == "cpu" and target.vocab_size >= kernels.LARGE_VOCABULARY:
            # Kernels are compiled now, not in the first request.
            kernels.has_kernels()

    @property
    def scheme_name(self) -> str:
        """The scheme that verifies."""
        return self._scheme.name

    @property
    def target_name(self) -> str:
        """The target."""
        return self.target.name

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of all steps so far, by part."""
        return dict(self.clock.seconds)

    def requests(self, prompt: Any, params: Any = None, **fields: Any) -> list[Request]:
        """See `RequestQueue.requests`."""
        made = super().requests(prompt, params, **fields)
        takes = made[0].params.prediction and made[0].params.speculative
        if takes and self.drafter.is_sampled and REGISTRY[self._scheme.name].tree_level:
            raise InvalidParameter(
                f"scheme {self._scheme.name} verifies whole trees and takes no prediction beside a draft",
                "use scheme mcss-wor, or draft='ngram'",
            )
        return made

    # Not in inference mode of the caller: caches are written in place, in later calls too.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _step(self) -> None:
        try:
            self.clock.start()
            self._free_cancelled()
            self._admit()
            if not self._running:
                return
            before = dict(self.clock.seconds)
            tree = self._draft()
            logits, hidden = self._score(tree)
            wanted = [index for index, request in enumerate(self._running) if request.trace]
            # Verification may change the history.
            traces = trace_trees(tree, logits, self._sampling, self._history, wanted, self._step_scheme.name)
            result, table = self._verify(tree, logits)
            verified = VerifiedSequence.read(table)
            self.clock.lap("judge")
            self._commit(result, verified, hidden)
            self.clock.lap("commit")
            self._observe(tree, verified, before)
            self._emit(tree, verified, logits, self._logprobs(tree, result, logits), traces)
            self._end_step_alone()
        except BaseException as error:
            if not self._abort(error):
                raise
        self.clock.lap("other")

    def _admit(self) -> None:
        started: dict[int, StartedText] = {}
        texts = TextsByBeginning()
        while len(self._running) < self.max_batch and (request := self._next(self._running)):
            self.clock.lap("other")
            request.clock = request.clock or dict(self.clock.seconds)
            self._running.append(request)
            self._has_changed = True
            self._start(request, started, texts)
            self.clock.lap("prefill")
        device, running = self.target.device, self._running
        assert self.cache.batch_size == len(running)
        if self._has_changed:
            self._sampling = BatchSamplingParams.of([r.params for r in running], device, [r.matcher for r in running])
            self._has_changed = False
            self._streams = PhiloxStreams(torch.tensor([request.seed for request in running], device=device))
            # The history sees what the requests append to their tokens.
            pairs = [(request.prompt, request.tokens) for request in running]
            self._history = TokenHistory([prompt for prompt, _ in pairs], [text for _, text in pairs])
        self._positions = [len(request.tokens) for request in running]
        # One copy to the device.
        table = torch.tensor([[request.all_tokens[-1] for request in running], self._positions], device=device)
        self._roots, self._positions_on_device = table[0, :, None], table[1]

    def _start(self, request: Request, started: dict[int, StartedText], texts: TextsByBeginning) -> None:
        """Start a sequence. What its prompt has in common with an earlier text, or one of ``started``, is not read."""
        tokens, index = list(request.all_tokens), self.cache.add()
        text, is_new = tokens[:-1], not request.tokens
        others = texts.like(text)
        if request.params.prompt_logprobs is None or not is_new:
            reused, take = self.prefixes.start(index, text[: self.drafter.most_reused(tokens)]), None
        else:
            # It needs the logits of its whole prompt, or those of an equal one.
            equal = [other for other in others if started[other].request.prompt == request.prompt]
            others = {other: text for other in equal if request.shares_prompt(started[other].request)}
            reused, take = 0, request.take_prompt_logits
        same, common = longest_common(text, others)
        hidden = None
        if common > reused and common > started[same].reused:
            self.cache.copy(same, index, common)
            reused, hidden = started[same].reused, started[same].hidden
            hidden = None if hidden is None else hidden[:, : common - reused]
        unread = text[self.cache.host_lengths[index] :]
        if is_new:
            request.reused_tokens = len(text) - len(unread)
        rest = prefill(self.target, self.cache, index, unread, self.drafter.hidden_layers, take)
        pieces = [each for each in (hidden, rest) if each is not None]
        hidden = torch.cat(pieces, dim=1) if pieces else None
        started[index] = StartedText(request, reused, hidden)
        texts.add(index, text)
        self.drafter.add(tokens, hidden)
        prediction = request.params.prediction
        if prediction and request.params.speculative and not isinstance(prediction, str):
            self.drafter = with_look_up(self.drafter, len(self._running))
            self.drafter.expect(request.prompt, prediction)

    def _draft(self) -> CandidateTree:
        assert self.plan is not None
        shape = PLAIN if self._sampling.all_plain else self.plan.choose(self._sampling.params)
        # Where trees adapt, matching keeps them out of the text of a seed: it is that of plain decoding.
        matches = self.plan.adapts and self._sampling.any_seeded
        self._step_scheme = self._matching if matches else self._scheme
        texts = [request.all_tokens for request in self._running]
        random = self._streams.at(self._positions, DRAW, self._positions_on_device)
        self.clock.lap("other")
        if len(shape):
            shape = self._catch_up(shape, texts)
            self.clock.lap("prefill")
        if shape != self.tree:
            check_planned(self.plan, self._scheme.name, shape)
            self.tree = shape
        self.drafter.min_confidence = getattr(self.plan, "min_confidence", 0.0) if len(shape) else 0.0
        tree = self.drafter.draft(texts, self.tree, self._step_scheme, self._sampling, random)
        if self._sampling.any_plain:
            tree = tree.without(self._sampling.plain)
        self.draft_levels += tree.shape.depth
        self.clock.lap("draft")
        return tree

    def _catch_up(self, shape: TreeShape, texts: list[list[int]]) -> TreeShape:
        """Let the drafter read what it lags behind by. Returns the tree; none if the plan finds it too slow."""
        stretches = getattr(self.plan, "stretches", None)
        if stretches and any(unread := self.drafter.unread(texts)):
            most = stretches(unread, [request.remaining for request in self._running])
            if most is None:
                return PLAIN
            self.drafter.skip(texts, most)
        self.drafter.catch_up(texts)
        return shape

    def _score(self, tree: CandidateTree) -> tuple[Tensor, Tensor | None]:
        """One forward of the target over the whole tree: logits ``[B, 1 + n, V]``, root first, and hidden states."""

        def forward(roots: Tensor, candidates: Tensor) -> Outputs:
            tokens = torch.cat([roots, candidates], dim=1)
            layout = TokenLayout.tree(tree.shape, self.target.device)
            output = self.target.forward(tokens, layout, self.cache, hidden_layers=self.drafter.hidden_layers)
            return output.logits, output.hidden

        columns = self.cache.reserve(1 + len(tree.shape))
        key = "score", tree.shape, columns
        logits, hidden = self.graphs.run(key, forward, self._roots, tree.tokens, generation=self.cache.generation)
        self.clock.lap("target")
        return logits, hidden

    def _verify(self, tree: CandidateTree, logits: Tensor) -> tuple[VerificationResult, Tensor]:
        """Verify the tree, and keep the accepted path in the target's cache. The table is what the host reads."""
        scheme = self._step_scheme

        def verify(
            tree: CandidateTree,
            logits: Tensor,
            sampling: BatchSamplingParams,
            history: TokenHistory,
            random: PhiloxStream,
        ) -> Outputs:
            result = scheme.verify(tree, logits, sampling, history, random)
            self.cache.keep(result.columns, result.accepted + 1)
            return result.path, result.accepted, result.token, result.failed, result.table(tree)

        stream = VERIFY if scheme.needs_q else SAMPLE
        random = self._streams.at(self._positions, stream, self._positions_on_device)
        if self._sampling.any_processors and logits.device.type != "cpu":
            # Processors are called with each path, which only the host can follow.
            given = (on_host(each) for each in (tree, logits, self._sampling, self._history, random))
            result = scheme.verify(*given).to(logits.device)
            self.cache.keep(result.columns, result.accepted + 1)
            return result, result.table(tree)
        if self._sampling.any_penalties and logits.device.type != "cpu":
            # The captured function reads them; it cannot make them.
            self._history.penalties(self._sampling, logits)
        key = "verify", tree.key, scheme.name, self._sampling.kind, self._sampling.any_plain
        arguments = tree, logits, self._sampling, self._history, random
        *parts, table = self.graphs.run(key, verify, *arguments, generation=self.cache.generation)
        result = VerificationResult(*parts)
        self._history.append(tree, result)
        return result, table

    def _commit(self, result: VerificationResult, verified: list[VerifiedSequence], hidden: Tensor | None) -> None:
        self.cache.advance([1 + len(each.path) for each in verified])
        if hidden is not None:
            hidden = hidden.gather(1, result.columns[..., None].expand(-1, -1, hidden.shape[-1]))
        self.drafter.commit(result.path, [each.path for each in verified], hidden)

    def _observe(self, tree: CandidateTree, verified: list[VerifiedSequence], before: dict[str, float]) -> None:
        assert self.plan is not None
        if self._sampling.all_plain:
            return  # The plan was not asked.
        spent = {part: seconds - before[part] for part, seconds in self.clock.seconds.items()}
        paths = [each.path for each in verified]
        self.plan.observe(StepOutcome.of(tree.key, self._sampling.params, paths, spent))

    def _logprobs(
        self, tree: CandidateTree, result: VerificationResult, logits: Tensor
    ) -> list[list[TokenLogprobs]] | None:
        """Log-probabilities of the tokens of a step for each sequence; None if no request wants them."""
        counts = (request.params.logprobs for request in self._running)
        most = max((count for count in counts if count is not None), default=None)
        if most is None:
            return None
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        return token_logprobs(logits[rows, result.columns], result.emitted(tree), most)

    def _emit(
        self,
        tree: CandidateTree,
        verified: list[VerifiedSequence],
        logits: Tensor,
        logprobs: list[list[TokenLogprobs]] | None,
        traces: dict[int, StepTrace],
    ) -> None:
        # From last to first: the last sequence, already handled, takes the index of one that ends.
        for i in range(len(self._running) - 1, -1, -1):
            request, each = self._running[i], verified[i]
            if request.done:  # Cancelled by another thread.
                if not each.failed:
                    self._keep(i)
                self._free(i)
                continue
            is_first = not request.tokens
            scores = None if logprobs is None else logprobs[i]
            trace = traces.get(i)
            if trace is not None:
                trace = with_path(trace, request.all_tokens[-1], each.path, each.tokens, self.tokenizer)
            emitted = each.tokens, len(each.path), each.drafted, scores, trace
            try:
                reason = request.append_tokens(*emitted) if each.tokens else None
            except Exception as error:  # Of the tokenizer.
                reason, request.error = None, step_error(error)
            if each.failed and not reason and request.error is None:
                is_draft, is_finite = bool(tree.failed[i]), bool(logits[i].amax(-1).isfinite().all())
                name = self.drafter.name if is_draft else self.target_name
                request.error = request.failure(name, is_draft, is_finite)
            if request.error is not None:
                self._free(i)
            elif reason:
                self.clock.lap("other")
                spent = {part: seconds - request.clock[part] for part, seconds in self.clock.seconds.items()}
                # Stats.seconds has five parts.
                spent["other"] += spent.pop("commit")
                request.finish(reason, spent)
                if not each.failed:
                    self._keep(i)
                self._free(i)
            elif is_first:
                # Now the prompt is known to have a distribution.
                self._keep(i)
