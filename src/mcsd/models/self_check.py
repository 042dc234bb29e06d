"""The self-check of tree attention: the logits of a small tree against those of its paths.

No list of names knows the models of tomorrow, so a model shows that it can read a tree: the tree with our cache, mask
and positions, its paths by the model alone. Both texts are short. A sliding window is made shorter for the check, and
one text stands at far positions, where rotary embeddings may change. A difference counts if it exceeds the rounding of
the dtype and is not small beside the difference that a wrong mask, wrong positions or a wrong window make. Where these
hardly change the logits, as in a network whose attention has no weight, the check sees no fault; there the fault would
change the output no more than rounding does.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from mcsd.errors import McsdError, UnsupportedModel
from mcsd.models.fusion import FusedRotary
from mcsd.models.kv_cache import KVCache
from mcsd.models.layout import TokenLayout
from mcsd.models.llama import LlamaForCausalLM
from mcsd.models.transformers import UNSUPPORTED_HINT, TransformersModel
from mcsd.models.unmodified import is_unmodified
from mcsd.tree import TreeShape

_TREE = TokenLayout.tree(TreeShape((-1, -1, 0, 1)))
"""A root, two children, and a child of each."""

_PATHS = (0, (0, 1, 3)), (0, (0, 2, 4)), (1, (0, 1, 3))
"""Sequence and nodes of the paths that are read. All texts cost time; the second sequence is there for its length."""

_LENGTHS = 3, 1
"""Committed tokens of the two sequences: they differ, so slots of a cache are not positions."""

_DEPTH = 3
_LONGEST = _LENGTHS[0] + _DEPTH
_WINDOW = 2
_FAR = 4096
"""A sequence at far positions is read beside the paths, and must not change them."""

_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}
_EXACT_TOLERANCE = 1e-3
"""Root mean square differences of logits by rounding, relative to the logits' own spread."""

_MOST_OF_A_FAULT = 0.3
"""How large a difference by rounding may be, relative to the difference that a fault makes."""

_FAULTY_NODES = 3
"""A fault changes so many of the compared nodes, or more."""

_passed: set[tuple[Any, ...]] = set()


def check_tree_attention(model: TransformersModel) -> None:
    """Check once for each class, configuration and dtype that a tree's logits are those of its paths.

    Raises:
        UnsupportedModel: they are not, or the model cannot read a tree.
    """
    if model.device.type == "meta":
        raise UnsupportedModel(f"{model.name} is on meta: its weights are not loaded", "load its weights")
    if isinstance(model.network, LlamaForCausalLM):
        return  # Of this package, whose tests check it.
    # Hooks and replaced methods are not in the key.
    key = _key(model) if is_unmodified(model.given) else None
    if key in _passed:
        return
    try:
        _check(model)
        if model.window is not None and model.window > _WINDOW:
            _check(_with_short_window(model))
    except (McsdError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # The code of any model may fail in any way.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _refused(model, f"cannot read a tree: {type(error).__name__}: {reason:.120}") from error
    if key is not None:
        _passed.add(key)


def _key(model: TransformersModel) -> tuple[Any, ...]:
    """What the computation depends on, but for weights."""
    config = model.network.config
    fields = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    fields = {name: value for name, value in fields.items() if name != "_name_or_path"}
    classes = tuple(type(module) for module in model.given.modules())
    attention = config._attn_implementation
    return classes, repr(fields), attention, model.dtype, model.device, transformers.__version__


@dataclass(frozen=True)
class _Texts:
    """Token ids of the check.

    Attributes:
        prompts: of each sequence.
        nodes: int64 ``[2, 5]``, the tokens of both trees.
    """

    prompts: list[list[int]]
    nodes: Tensor

    @classmethod
    def of(cls, model: TransformersModel) -> "_Texts":
        """Random tokens; none that the configuration names, which may stand for images or pad."""
        special = _special_tokens(model.network.config) | _special_tokens(model.network.config.get_text_config())
        order = torch.randperm(model.vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
        ids = [token for token in order[:256] if token not in special] or [0]
        ids = [ids[place % len(ids)] for place in range(sum(_LENGTHS) + 2 * _TREE.total)]
        space = (model.max_length or _LONGEST) - _DEPTH
        prompts = [ids[: min(_LENGTHS[0], space)], ids[_LENGTHS[0] :][: min(_LENGTHS[1], space)]]
        return cls(prompts, torch.tensor(ids[sum(_LENGTHS) :], device=model.device).view(2, -1))

    def paths(self) -> list[list[int]]:
        """The texts of `_PATHS`."""
        nodes = self.nodes.tolist()
        return [self.prompts[sequence] + [nodes[sequence][node] for node in path] for sequence, path in _PATHS]


def _special_tokens(config: Any) -> set[int]:
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    each = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return {one for one in each if isinstance(one, int)}


def _check(model: TransformersModel) -> None:
    if model.max_length is not None and model.max_length < _DEPTH:
        return
    texts = _Texts.of(model)
    paths = _path_logits(model, texts)
    if not all(bool(logits.isfinite().all()) for logits in paths):
        return  # Weights with NaN are named by the request that meets them.
    limit = _TOLERANCE.get(model.dtype, _EXACT_TOLERANCE)
    first, second = (logits[: 1 + len(texts.prompts[0])] for logits in paths[:2])
    if not bool((_distances(first, second) <= limit).all()):
        raise _refused(model, "attends to later tokens: its attention is not causal")
    expected = torch.cat([logits[-_DEPTH:] for logits in paths])
    tree = _Tree(model, texts)
    found = tree.logits(_TREE)
    if tree.cache.is_empty:
        raise _refused(model, "does not use a key-value cache")
    distances = _distances(found, expected)
    if bool((distances <= limit).all()):
        return
    faults = {reason: tree.logits(layout) for reason, layout in _FAULTS.items()}
    if model.window is not None:
        faults[_WRONG_WINDOW] = tree.logits(_TREE, model.window + 1)
    power = min(float(_distances(wrong, expected).sort().values[-_FAULTY_NODES]) for wrong in faults.values())
    # One node may differ: rounding may change its experts.
    if float(distances.sort().values[-2]) <= _MOST_OF_A_FAULT * power:
        return
    for reason, wrong in faults.items():
        if bool((_distances(found, wrong) <= limit).all()):
            raise _refused(model, reason)
    difference = f"(by {float(distances.max()):.2g} of their spread)"
    window = "" if model.window is None else ", perhaps by a sliding window that is not what its configuration says"
    raise _refused(model, f"gives a tree other logits than its paths {difference}{window}")


_WRONG_WINDOW = "has no sliding window, or one of another length than its configuration says"
_FAULTS = {
    "ignores the mask of a tree": TokenLayout(_TREE.offsets, torch.ones_like(_TREE.mask).tril()),
    "derives positions from cache slots, where siblings of a tree differ": TokenLayout(
        torch.arange(_TREE.total), _TREE.mask
    ),
}
"""Wrong layouts of the tree, by what is wrong with a model whose logits they do not change."""


class _Tree:
    """Reads the trees of the check behind their prompts, as the engine does."""

    def __init__(self, model: TransformersModel, texts: _Texts) -> None:
        self._model, self._nodes = model, texts.nodes
        self.cache: KVCache = model.new_cache(2, _LONGEST + _TREE.total)
        for _ in texts.prompts:
            self.cache.add()
        counts = [len(prompt) for prompt in texts.prompts]
        if longest := max(counts):
            rows = [prompt + [prompt[0]] * (longest - len(prompt)) for prompt in texts.prompts]
            tokens = torch.tensor(rows, device=model.device)
            model.forward(tokens, TokenLayout.chain(longest, model.device), self.cache, logits=False)
            columns = torch.arange(longest, device=model.device).expand(len(rows), -1)
            self.cache.commit(columns, torch.tensor(counts, device=model.device), host_counts=counts)

    def logits(self, layout: TokenLayout, window: int | None = None) -> Tensor:
        """float32 ``[9, V]``, of the nodes of `_PATHS`; with the model's sliding window or another one."""
        own, self._model.window = self._model.window, window or self._model.window
        try:
            logits = self._model.forward(self._nodes, layout.to(self._model.device), self.cache).logits.float()
        finally:
            self._model.window = own
        return torch.cat([logits[sequence, list(path)] for sequence, path in _PATHS])


def _path_logits(model: TransformersModel, texts: _Texts) -> list[Tensor]:
    """float32 logits ``[n, V]`` of every token of each path, by the model alone: no cache, no mask."""
    paths = texts.paths()
    longest = max(map(len, paths))
    # Shorter paths end in tokens that a causal model does not see from before.
    rows = [path + [path[0]] * (longest - len(path)) for path in paths]
    positions = torch.arange(longest, device=model.device).expand(len(rows), -1)
    if not any(isinstance(module, FusedRotary) for module in model.network.modules()):
        rows.append(rows[0])
        far = min(model.max_length or _FAR, _FAR) - longest
        positions = torch.cat([positions, positions[:1] + far])
    found = model.plain_logits(torch.tensor(rows, device=model.device), positions)
    return [logits[: len(path)].float() for logits, path in zip(found, paths, strict=False)]


def _distances(logits: Tensor, expected: Tensor) -> Tensor:
    """Root mean square differences ``[..., n]``, relative to the standard deviation of the logits."""
    spread = expected.std(-1, correction=0).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (logits - expected).square().mean(-1).sqrt() / spread


def _with_short_window(model: TransformersModel) -> TransformersModel:
    """A copy with the same weights and a sliding window that the check's texts exceed."""
    network: Any = model.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    for holder in (copied.config, copied.config.get_text_config(), *copied.modules()):
        for part in (holder, getattr(holder, "config", None)):
            if getattr(part, "sliding_window", None) == model.window:
                part.sliding_window = _WINDOW  # type: ignore[union-attr]
    return TransformersModel(copied, model.name)


def _refused(model: TransformersModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{type(model.network).__name__} {reason}", UNSUPPORTED_HINT)
