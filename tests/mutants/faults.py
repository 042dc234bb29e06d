"""Plausible faults, each a change of one place in the source. Most are faults that published code has had."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``old`` stands once in ``file`` (below ``mcsd``) and is replaced by ``new``."""

    name: str
    file: str
    old: str
    new: str


_RECURSIVE, _RESIDUAL, _BASE = "schemes/recursive.py", "schemes/residual.py", "schemes/base.py"
_CANDIDATES, _WALK = "schemes/candidates.py", "schemes/walk.py"
_SAMPLING, _ENGINE, _LEVELS = "sampling.py", "engine.py", "drafters/levels.py"
_GREEDY, _KSEQ, _HUB = "schemes/greedy_draft.py", "schemes/kseq.py", "schemes/spechub.py"
_BLOCK, _TRAVERSAL, _RNG = "schemes/block.py", "schemes/traversal.py", "rng.py"
_MODEL, _CACHE, _FUSION = "models/transformers.py", "models/cache.py", "models/fusion.py"
KERNELS = "kernels/"
_LAYERS, _DISTRIBUTIONS = f"{KERNELS}layers.cpp", f"{KERNELS}distributions.cpp"

_Q_THEN_ALPHA = """            q = torch.where(there[:, None], renormalised(q.scatter(1, choice[:, None], 0.0)), q)
            if column:
                alpha = torch.where(there & (alpha < 1), mass / (mass + 1 - alpha), alpha)
"""

FAULTS = (
    Fault(
        "residual with the new q instead of the old",
        _RECURSIVE,
        "subtract(r, q)",
        "subtract(r, renormalised(q.scatter(1, choice, 0.0)))",
    ),
    Fault("residual not renormalised", _RECURSIVE, "residual / mass[:, None], r)", "residual, r)"),
    Fault("q not renormalised after a rejection", _RECURSIVE, "renormalised(rest), q)", "rest, q)"),
    Fault(
        "drawn without replacement, judged as with",
        _RECURSIVE,
        "without_replacement = True",
        "without_replacement = False",
    ),
    Fault(
        "drawn with replacement, judged as without",
        _RECURSIVE,
        "(DrawsWithoutReplacement, _Recursive)",
        "(IndependentDraws, _Recursive)",
    ),
    Fault(
        "equal draws counted once",
        _RECURSIVE,
        "(IndependentDraws, _Recursive)",
        "(DrawsWithoutReplacement, _Recursive)",
    ),
    Fault(
        "judged out of draw order",
        _RECURSIVE,
        "for j in range(children):",
        "for j in reversed(range(children)):",
    ),
    Fault(
        "every candidate judged by p, not by what is left of it",
        _RECURSIVE,
        "r.gather(1, choice) / q",
        "on_support(node.p, node.q.support)[0].gather(1, choice) / q",
    ),
    Fault(
        "after all rejections a draw from p",
        _RECURSIVE,
        "sample_where_none(picked, r, outside",
        "sample_where_none(picked, on_support(node.p, node.q.support)[0], outside",
    ),
    Fault("float16 residual", _RESIDUAL, "(0, 1))).clamp(min=0)", "(0, 1))).clamp(min=0).half().to(r.dtype)"),
    Fault("residual by magnitude instead of clipped", _RESIDUAL, "(0, 1))).clamp(min=0)", "(0, 1))).abs()"),
    Fault(
        "the target's mass outside of the draft's support forgotten",
        _RESIDUAL,
        "pad(q, (0, 1))",
        "pad(q, (0, 1), value=2.0)",
    ),
    Fault("outside counted twice on the support", _RESIDUAL, "p.scatter(1, support, 0.0)", "p.clone()"),
    Fault(
        "bonus from the parent",
        _CANDIDATES,
        "self.logits[rows, columns]",
        "self.logits[rows, (columns - 1).clamp(min=0)]",
    ),
    Fault("candidates that were never drawn are judged", _WALK, "valid.bool()", "torch.arange(width) < count[:, None]"),
    Fault("a sibling's tokens judged", _WALK, "Node(p, tokens, ", "Node(p, tokens.flip(1), "),
    Fault("at temperature 0 the first child goes on", _WALK, "tokens[row][node] == token", "tokens[row][node] >= 0"),
    Fault(
        "q of another node", _WALK, "self._q.support, self._q.weights)", "self._q.support, self._q.weights.roll(1, 1))"
    ),
    Fault(
        "candidates on the way not counted by penalties",
        _CANDIDATES,
        "self.texts.texts[row] + on_path",
        "self.texts.texts[row]",
    ),
    Fault("soft probabilities at temperature 0", _SAMPLING, "if settings.any_greedy:", "if settings.all_greedy:"),
    Fault(
        "the target's temperature left out",
        _SAMPLING,
        "p = _softmax(logits, settings)",
        "p = logits.softmax(-1)",
    ),
    Fault(
        "q judged before its warper",
        _LEVELS,
        "laws.append(level_q)",
        "laws.append(flat.softmax(-1).gather(1, q.support).view(batch, inner, -1))",
    ),
    Fault(
        "q judged in float16",
        _LEVELS,
        "laws.append(level_q)",
        "laws.append(level_q.half().to(level_q))",
    ),
    Fault(
        "tokens read from another parent's support",
        _LEVELS,
        "named.index_select(1, level.parent)",
        "named.index_select(1, level.parent * 0)",
    ),
    Fault(
        "top-k off by one",
        _SAMPLING,
        "top >= top.gather(1, limit[:, None] - 1)",
        "top >= top.gather(1, (limit[:, None] - 2).clamp(min=0))",
    ),
    Fault(
        "top-p applied to the draft only",
        _SAMPLING,
        "if settings.any_truncates:\n        chosen",
        "if False:\n        chosen",
    ),
    Fault("drawing and judging share their noise", _ENGINE, "self._positions, JUDGE)", "self._positions, DRAW)"),
    Fault("every step judges with the same noise", _ENGINE, "self._positions, JUDGE)", "[0] * len(self._rows), JUDGE)"),
    Fault(
        "rows share their noise",
        _ENGINE,
        "Streams(seeds)",
        "Streams(seeds * 0)",
    ),
    Fault("a number used twice", _RNG, "self._used += count", "self._used = count"),
    Fault("uneven random numbers", _RNG, "cumulative, u * cumulative", "cumulative, u.sqrt() * cumulative"),
    Fault(
        "accepted path gathered in the wrong order",
        _ENGINE,
        "columns = torch.nn.functional.pad(verdict.path + 1, (1, 0), value=0)",
        "columns = torch.nn.functional.pad(verdict.path + 1, (1, 0), value=0).flip(1)",
    ),
    Fault(
        "the path's cache kept one place off",
        _ENGINE,
        "columns = torch.nn.functional.pad(verdict.path + 1,",
        "columns = torch.nn.functional.pad(verdict.path.clamp(min=0),",
    ),
    Fault(
        "siblings see each other",
        "models/base.py",
        "return cls(shape.offsets, shape.mask)",
        "return cls(shape.offsets, torch.ones_like(shape.mask).tril())",
    ),
    Fault(
        "mask off by one: a node does not see its parent",
        "models/base.py",
        "return cls(shape.offsets, shape.mask)",
        "return cls(shape.offsets, shape.mask & ~torch.ones_like(shape.mask).tril(-1).triu(-1))",
    ),
    Fault(
        "positions by place in the tree, not by depth",
        _MODEL,
        "block.offsets.to(self.device)",
        "torch.arange(len(block.offsets))",
    ),
    Fault(
        "stale cache row after another ends",
        "models/base.py",
        "            self.copy(last, row)\n",
        "            self.lengths[row] = self.lengths[last]\n",
    ),
    Fault(
        "a shared prompt copied one token short",
        "models/base.py",
        "            self.copy(like, row)\n",
        "            self.copy(like, row)\n            self.lengths[row] -= 1\n",
    ),
    Fault(
        "a shared prompt's keys not copied",
        "models/base.py",
        "            self.copy(like, row)\n",
        "            self.lengths[row] = self.lengths[like]\n",
    ),
    Fault(
        "a shared prompt taken for its beginning",
        "engine.py",
        "begun.get(tuple(request.prompt), (None, None))",
        "next(((at, h) for p, (at, h) in begun.items() if p[:1] == tuple(request.prompt[:1])), (None, None))",
    ),
    Fault(
        "an end of text inside a path ignored",
        "request.py",
        "if token in self._eos or",
        "if (token in self._eos and token == tokens[-1]) or",
    ),
    Fault("k-seq without its ρ", _KSEQ, "rho = smallest_rho(p, q, tries)", "rho = torch.ones_like(p[:, :1])"),
    Fault("k-seq's residual for one draw", _KSEQ, "served = each * _times(beta, tries)", "served = each"),
    Fault("greedy-draft judged by q", _GREEDY, "q = renormalised(rest) *", "q = node.q.weights *"),
    Fault(
        "greedy-draft's draw may repeat a sure one",
        _GREEDY,
        "top.where(sure, size), 0.0)[..., :size]",
        "top.where(sure, size) * 0 + size, 0.0)[..., :size]",
    ),
    Fault(
        "spechub's hub served in the wrong order",
        _HUB,
        "hub_by_first / left_first, hub_by_second / left_second",
        "hub_by_second / left_second, hub_by_first / left_first",
    ),
    Fault("spechub's second draw not renormalised", _HUB, "center * renormalised(spokes)", "center * spokes"),
    Fault("block's weight not capped", _BLOCK, "weight = ratio.clamp(max=1.0)", "weight = ratio"),
    Fault("block's residual as after one token", _BLOCK, "subtract(weight[:, None] * r,", "subtract(r,"),
    Fault("block's test token by token", _BLOCK, "torch.where(goes_on, share, weight)", "weight"),
    Fault(
        "traversal's α as a circulating version has it",
        _TRAVERSAL,
        _Q_THEN_ALPHA,
        _Q_THEN_ALPHA.replace("            q =", "            left_of_q = 1 - at(q, choice)\n            q =").replace(
            "mass / (mass + 1 - alpha)", "(mass / left_of_q).clamp(max=1.0)"
        ),
    ),
    Fault("traversal forgets to lower α", _TRAVERSAL, "            if column:\n", "            if False:\n"),
    Fault(
        "queries that share keys grouped by node",
        _FUSION,
        "self.head_size).permute(0, 2, 3, 1, 4)",
        "self.head_size).permute(0, 2, 1, 3, 4)",
    ),
    Fault(
        "heads turned the wrong way",
        _FUSION,
        ": self._table.shape[2] // 2].neg_()",
        "self._table.shape[2] // 2 :].neg_()",
    ),
    Fault(
        "in our kernels every candidate sees what the root does",
        _LAYERS,
        "place.sight[own * known + other]",
        "place.sight[other]",
    ),
    Fault(
        "in our kernels every token is turned by the first one's position",
        _LAYERS,
        "angles.positions[row] : row",
        "angles.positions[0] : row",
    ),
    Fault(
        "in our kernels all layers look at the first one's keys",
        _LAYERS,
        "keys = Numbers{place.keys, HALF}.from(start)",
        "keys = Numbers{place.keys, HALF}",
    ),
    Fault(
        "in our kernels the target is sampled at temperature 1",
        _DISTRIBUTIONS,
        "factors ? factors[piece.row] : 1",
        "1",
    ),
)
