"""Plausible faults, each a change of one place in the source. Most have occurred in published code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``old`` occurs once in ``file`` (below ``mcsd``) and is replaced by ``new``."""

    name: str
    file: str
    old: str
    new: str


_RECURSIVE, _RESIDUAL = "schemes/recursive.py", "schemes/residual.py"
_TYPES, _NODES = "schemes/types.py", "schemes/node_level.py"
_SAMPLING, _CORE, _LEVELS = "sampling.py", "core.py", "drafters/level.py"
_MAP = "models/vocabulary_map.py"
_GREEDY, _KSEQ, _HUB = "schemes/greedy_draft.py", "schemes/kseq.py", "schemes/spechub.py"
_BLOCK, _TRAVERSAL, _RNG = "schemes/block.py", "schemes/traversal.py", "rng.py"
_CACHE, _LAYOUT, _MASKS, _FUSION = "models/protocol.py", "models/layout.py", "models/masks.py", "models/fusion.py"
_GRAMMARS, _SCHEME = "grammars.py", "schemes/base.py"
_PREFIX_CACHE, _MIXED = "models/prefix_cache.py", "schemes/mixed.py"
_HEAD, _HEADS, _DRAFTS_OF_HEADS = "models/draft_head.py", "loading/published_heads.py", "drafters/head.py"
KERNELS = "kernels/"
_DECODER, _DISTRIBUTIONS = f"{KERNELS}decoder.cpp", f"{KERNELS}distributions.cpp"
_GGUF, _GGUF_TYPES = f"{KERNELS}gguf.cpp", f"{KERNELS}gguf_types.h"

_Q_THEN_ALPHA = """            q = torch.where(valid[:, None], renormalised(q.scatter(1, choice[:, None], 0.0)), q)
            if column:
                alpha = torch.where(valid & (alpha < 1), mass / (mass + 1 - alpha), alpha)
"""

FAULTS = (
    Fault(
        "plain sequences: what others accept is counted",
        _SCHEME,
        "result.accepted.masked_fill(plain, 0)",
        "result.accepted",
    ),
    Fault("plain sequences: later numbers of the stream", _SCHEME, "target, random.again)", "target, random)"),
    Fault(
        "plain sequences: they fail with their draft",
        _SCHEME,
        "torch.where(plain, sampled.failed, result.failed)",
        "result.failed",
    ),
    Fault("plain sequences: their candidates are matched", _CORE, "tree.without(self._sampling.plain)", "tree"),
    Fault(
        "heads: d2t off by one",
        _HEADS,
        "torch.arange(config.vocab_size) + d2t",
        "torch.arange(config.vocab_size) + d2t - 1",
    ),
    Fault("heads: hidden states of the layer before", _HEADS, "[layer + 1 for layer in layers]", "list(layers)"),
    Fault(
        "heads: hidden states of the layer after",
        _HEADS,
        "(2, count // 2, count - 3)",
        "(3, count // 2 + 1, count - 2)",
    ),
    Fault(
        "heads: the residual taken before the norm",
        _HEAD,
        "normed if self.norm_before_residual else state",
        "state",
    ),
    Fault(
        "heads: the residual taken after the norm",
        _HEAD,
        "normed if self.norm_before_residual else state",
        "normed",
    ),
    Fault(
        "heads: own hidden states instead of the target's after acceptance",
        _DRAFTS_OF_HEADS,
        "self.model.forward(pending.tokens, states[0], layout, self.cache)",
        "self.model.forward(pending.tokens, states[0] if self._own_hidden.numel() == 0 else"
        " self._own_hidden[:, :1].expand(-1, pending.tokens.shape[1], -1), layout, self.cache,"
        " own=self._own_hidden.numel() > 0)",
    ),
    Fault("heads: own hidden states read normalized", _HEAD, "if not config.norm_output:", "if False:"),
    Fault("heads: the first token is read", "models/bound_head.py", "self.config.skips_first", "False"),
    Fault(
        "residual with the new q instead of the old",
        _RECURSIVE,
        "subtract(r, q)",
        "subtract(r, renormalised(q.scatter(1, choice, 0.0)))",
    ),
    Fault("residual not renormalised", _RECURSIVE, "residual / mass[:, None], r)", "residual, r)"),
    Fault("q not renormalised after a rejection", _RECURSIVE, "renormalised(rest), q)", "rest, q)"),
    Fault(
        "drawn without replacement, verified as with",
        _RECURSIVE,
        "without_replacement = True",
        "without_replacement = False",
    ),
    Fault(
        "drawn with replacement, verified as without",
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
        "verified out of draw order",
        _RECURSIVE,
        "for j in range(children):",
        "for j in reversed(range(children)):",
    ),
    Fault(
        "every candidate verified against p, not against the residual",
        _RECURSIVE,
        "r.gather(1, choice) / q",
        "on_support(node.p, node.q.support)[0].gather(1, choice) / q",
    ),
    Fault(
        "after all rejections a draw from p, not from the residual",
        _RECURSIVE,
        "sample_if_rejected(picked, r, outside",
        "sample_if_rejected(picked, on_support(node.p, node.q.support)[0], outside",
    ),
    Fault("float16 residual", _RESIDUAL, "(0, 1))).clamp(min=0)", "(0, 1))).clamp(min=0).half().to(r.dtype)"),
    Fault("residual by absolute value instead of clipped", _RESIDUAL, "(0, 1))).clamp(min=0)", "(0, 1))).abs()"),
    Fault(
        "the target's mass outside of the draft's support ignored",
        _RESIDUAL,
        "pad(q, (0, 1))",
        "pad(q, (0, 1), value=2.0)",
    ),
    Fault("outside counted twice on the support", _RESIDUAL, "p.scatter(1, support, 0.0)", "p.clone()"),
    Fault(
        "bonus token from the parent's logits",
        _TYPES,
        "logits = self.logits[sequences, columns] if",
        "logits = self.logits[sequences, (columns - 1).clamp(min=0)] if",
    ),
    Fault(
        "candidates that were never drawn are verified", _NODES, "valid.bool()", "torch.arange(width) < count[:, None]"
    ),
    Fault("a sibling's tokens verified", _NODES, "Node(p, tokens, ", "Node(p, tokens.flip(1), "),
    Fault(
        "at temperature 0 the first child is accepted",
        _NODES,
        "tokens[sequence][node] == token",
        "tokens[sequence][node] >= 0",
    ),
    Fault(
        "q of another node", _NODES, "self._q.support, self._q.weights)", "self._q.support, self._q.weights.roll(1, 1))"
    ),
    Fault(
        "candidates on the path not counted by penalties",
        _TYPES,
        "self.history.generated[sequence] + on_path",
        "self.history.generated[sequence]",
    ),
    Fault(
        "processors do not see the candidates on the path",
        _SAMPLING,
        "torch.tensor([[*prompt, *text]], device=logits.device)",
        "torch.tensor([[*prompt]], device=logits.device)",
    ),
    Fault("grammars do not mask the draft", _LEVELS, "flat = self._mask(flat, each, level, tokens)", "pass"),
    Fault(
        "the draft is masked by the state of the parent",
        _LEVELS,
        "for node in nodes] for tree",
        "for node in nodes[:-1]] for tree",
    ),
    Fault(
        "the target is masked by the state of the parent",
        _TYPES,
        "logits = mask_tokens(logits, matchers, on_path)",
        "logits = mask_tokens(logits, matchers, [path[:-1] for path in on_path])",
    ),
    Fault("candidates are not rolled back", _GRAMMARS, "self._matcher.rollback(len(self._path) - same)", "pass"),
    Fault("a text may end before its grammar does", _GRAMMARS, "= not may_end", "= False"),
    Fault(
        "one typical token too few",
        _SAMPLING,
        "distance <= distance.gather(1, last)",
        "distance < distance.gather(1, last)",
    ),
    Fault("soft probabilities at temperature 0", _SAMPLING, "if sampling.any_greedy:", "if sampling.all_greedy:"),
    Fault(
        "the target's temperature ignored",
        _SAMPLING,
        "p = ops.softmax(logits, sampling.scaling_temperature)",
        "p = ops.softmax(logits)",
    ),
    Fault(
        "q verified without its warpers",
        _LEVELS,
        "weights.append(level_weights)",
        "weights.append(flat.softmax(-1).gather(1, q.support).view(batch, inner, -1))",
    ),
    Fault(
        "q verified in float16",
        _LEVELS,
        "weights.append(level_weights)",
        "weights.append(level_weights.half().to(level_weights))",
    ),
    Fault(
        "tokens looked up in another parent's support",
        _LEVELS,
        "support.index_select(1, level.child_parent)",
        "support.index_select(1, level.child_parent * 0)",
    ),
    Fault(
        "q of a draft vocabulary in tokens of the draft",
        _LEVELS,
        "supports.append(support)",
        "supports.append(q.support.view_as(support))",
    ),
    Fault(
        "tokens that a draft with another tokenizer does not share drawn as another token",
        _MAP,
        "target_ids[token] for column, token in enumerate(tokens) if token in target_ids}",
        "target_ids.get(token, 0) for column, token in enumerate(tokens)}",
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
        "if sampling.any_truncates:\n        chosen",
        "if False:\n        chosen",
    ),
    Fault(
        "drawing and verification share their random numbers",
        _CORE,
        "stream = VERIFY if",
        "stream = DRAW if",
    ),
    Fault(
        "every step verifies with the same random numbers",
        _CORE,
        "self._positions, stream, self._positions_on_device)",
        "[0] * len(self._running), stream, self._positions_on_device * 0)",
    ),
    Fault(
        "sequences share their random numbers",
        _CORE,
        "PhiloxStreams(torch.tensor([request.seed for",
        "PhiloxStreams(torch.tensor([0 * request.seed for",
    ),
    Fault("a random number used twice", _RNG, "self._used += count", "self._used = count"),
    Fault(
        "random numbers that are not uniform", _RNG, "cumulative, u * cumulative", "cumulative, u.sqrt() * cumulative"
    ),
    Fault(
        "accepted path gathered in the wrong order",
        _TYPES,
        "torch.nn.functional.pad(self.path + 1, (1, 0), value=0)",
        "torch.nn.functional.pad(self.path + 1, (1, 0), value=0).flip(1)",
    ),
    Fault(
        "the path's cache entries off by one",
        _TYPES,
        "torch.nn.functional.pad(self.path + 1,",
        "torch.nn.functional.pad(self.path.clamp(min=0),",
    ),
    Fault(
        "siblings attend to each other",
        _LAYOUT,
        "return cls(shape.offsets, shape.mask)",
        "return cls(shape.offsets, torch.ones_like(shape.mask).tril())",
    ),
    Fault(
        "mask off by one: a node does not attend to its parent",
        _LAYOUT,
        "return cls(shape.offsets, shape.mask)",
        "return cls(shape.offsets, shape.mask & ~torch.ones_like(shape.mask).tril(-1).triu(-1))",
    ),
    Fault(
        "positions by index in the tree, not by depth",
        _MASKS,
        "lengths[:, None] + layout.offsets",
        "lengths[:, None] + torch.arange(len(layout.offsets))",
    ),
    Fault(
        "stale cache after another sequence ends",
        _CACHE,
        "            self.copy(last, index)\n",
        "            self.lengths[index] = self.lengths[last]\n",
    ),
    Fault(
        "a shared prompt copied one token short",
        _CORE,
        "self.cache.copy(same, index, common)\n",
        "self.cache.copy(same, index, common)\n            self.cache.lengths[index] -= 1\n",
    ),
    Fault(
        "a shared prompt's keys not copied",
        _CORE,
        "self.cache.copy(same, index, common)\n",
        "self.cache.advance([common], slice(index, index + 1))\n            self.cache.lengths[index] = common\n",
    ),
    Fault(
        "prompts that share only their first token treated as equal",
        _PREFIX_CACHE,
        "if a != b)",
        "if a != b and i == 0)",
    ),
    Fault(
        "an EOS token inside a path ignored",
        "request.py",
        "if met or token in self._ends or",
        "if met or (token in self._ends and token == tokens[-1]) or",
    ),
    Fault("k-seq without its ρ", _KSEQ, "rho = smallest_rho(p, q, tries, children)", "rho = torch.ones_like(p[:, :1])"),
    Fault(
        "k-seq's residual for one draw",
        _KSEQ,
        "accepted_mass = each * _geometric_sum(beta, tries, children)",
        "accepted_mass = each",
    ),
    Fault("greedy-draft verified against q, not q'", _GREEDY, "q = renormalised(rest) *", "q = node.q.weights *"),
    Fault(
        "greedy-draft's draw may repeat a deterministic candidate",
        _GREEDY,
        "top.where(deterministic, size), 0.0)[..., :size]",
        "top.where(deterministic, size) * 0 + size, 0.0)[..., :size]",
    ),
    Fault(
        "spechub's pairs serve the hub in the wrong order",
        _HUB,
        "hub_by_first / rest_first, hub_by_second / rest_second",
        "hub_by_second / rest_second, hub_by_first / rest_first",
    ),
    Fault("spechub's second draw not renormalised", _HUB, "center * renormalised(spokes)", "center * spokes"),
    Fault("block's weight not capped", _BLOCK, "weight = ratio.clamp(max=1.0)", "weight = ratio"),
    Fault("block's residual without the weight", _BLOCK, "subtract(weight[:, None] * r,", "subtract(r,"),
    Fault("block's test token by token", _BLOCK, "torch.where(continues, share, weight)", "weight"),
    Fault(
        "traversal's α as in a biased published version",
        _TRAVERSAL,
        _Q_THEN_ALPHA,
        _Q_THEN_ALPHA.replace("            q =", "            q_rest = 1 - at(q, choice)\n            q =").replace(
            "mass / (mass + 1 - alpha)", "(mass / q_rest).clamp(max=1.0)"
        ),
    ),
    Fault("traversal does not update α", _TRAVERSAL, "            if column:\n", "            if False:\n"),
    Fault(
        "queries that share keys grouped by node",
        "models/llama.py",
        "group, size).permute(0, 2, 3, 1, 4)",
        "group, size).permute(0, 2, 1, 3, 4)",
    ),
    Fault(
        "heads turned the wrong way",
        _FUSION,
        ": table.shape[2] // 2].neg_()",
        "table.shape[2] // 2 :].neg_()",
    ),
    Fault(
        "drawn candidates verified against p, not against p without the looked-up token",
        _MIXED,
        "torch.where(is_candidate[:, None] & (mass > 0), rest / mass, node.p)",
        "node.p",
    ),
    Fault("p without the looked-up token not renormalised", _MIXED, "rest / mass", "rest"),
    Fault(
        "a looked-up candidate accepted whatever the target samples",
        _MIXED,
        "hit = is_candidate & (first[:, 0] == y)",
        "hit = is_candidate & (y >= 0)",
    ),
    Fault(
        "the looked-up child verified as the first drawn one",
        _MIXED,
        "torch.arange(drawn, device=p.device) + node.looked_up.long()[:, None]",
        "(torch.arange(drawn, device=p.device) + 0 * node.looked_up.long()[:, None])",
    ),
    Fault(
        "kernels: every candidate has the root's attention mask",
        _DECODER,
        "metadata.mask[own * others + other]",
        "metadata.mask[other]",
    ),
    Fault(
        "kernels: RoPE of every token by the first one's position",
        _DECODER,
        "rope.positions[token] : token",
        "rope.positions[0] : token",
    ),
    Fault(
        "kernels: all layers attend to the first one's keys",
        _DECODER,
        "keys = FloatView{metadata.keys, BF16}.at(offset)",
        "keys = FloatView{metadata.keys, BF16}",
    ),
    Fault(
        "kernels: the target is sampled at temperature 1",
        _DISTRIBUTIONS,
        "factors ? factors[span.row] : 1",
        "1",
    ),
    Fault(
        "GGUF kernels: the offset of types without minimums",
        _GGUF_TYPES,
        "(MAX_VALUE + 1) / 2",
        "MAX_VALUE / 2",
    ),
    Fault(
        "GGUF kernels: the fifth bits of a block's second half are those of its first",
        _GGUF_TYPES,
        "group]), i, 4, 0x10101010",
        "group]), i % 4, 4, 0x10101010",
    ),
    Fault(
        "GGUF kernels: Q8_0 with another sign",
        _GGUF_TYPES,
        "if (TYPE == Q8_0 && !SIGNED_BYTES)",
        "if (TYPE == Q8_0 && SIGNED_BYTES)",
    ),
    Fault(
        "GGUF kernels: the minimums of Q4_1 and Q5_1 subtracted",
        _GGUF_TYPES,
        "multiply(minimum, set_row_floats(-1))",
        "minimum",
    ),
    Fault(
        "GGUF kernels: scales of the block before",
        _GGUF_TYPES,
        "<< group % 2 * 16;\n            if (OWN",
        "<< 0;\n            if (OWN",
    ),
    Fault(
        "GGUF kernels: Q4_K and Q5_K: the upper bits of a group scale",
        _GGUF_TYPES,
        "lower_four_bits(c) | move_bits(a, 6, 4, 0x30303030)",
        "lower_four_bits(c)",
    ),
    Fault(
        "GGUF kernels: Q4_K and Q5_K: minimums of the wrong groups",
        _GGUF_TYPES,
        "b & six, lower",
        "a & six, lower",
    ),
    Fault(
        "GGUF kernels: Q5_K: the fifth bit of the next group",
        _GGUF_TYPES,
        "w[FIFTH + i]), 4 * four)",
        "w[FIFTH + i]), 4 * four + 1)",
    ),
    Fault(
        "GGUF kernels: Q6_K: upper bits of the first group",
        _GGUF_TYPES,
        "2 * quarter, 4, 0x30303030",
        "0, 4, 0x30303030",
    ),
    Fault(
        "GGUF kernels: Q6_K: one group scale for 32 weights",
        _GGUF,
        "scales.scales[group * PARTS + part]",
        "scales.scales[group * PARTS]",
    ),
    Fault(
        "GGUF kernels: Q6_K: the zero point of the other half group",
        _GGUF,
        "ZERO_POINT * halves[half]",
        "ZERO_POINT * halves[1 - half]",
    ),
    Fault(
        "GGUF kernels: activations of the chunk before",
        _GGUF,
        "activations + token * chunks + chunk, chunks",
        "activations + token * chunks, chunks",
    ),
    Fault(
        "GGUF kernels: one scale for a chunk of activations",
        _GGUF,
        "set_row_floats(chunk.scales[group])",
        "set_row_floats(chunk.scales[0])",
    ),
    Fault(
        "GGUF kernels: a row of query heads in the order of the file",
        _GGUF,
        "if (!rope_size) return output;",
        "if (rope_size >= 0) return output;",
    ),
    Fault(
        "GGUF kernels: the first of several matrices for all outputs",
        _GGUF,
        "tensor->weight + first",
        "static_cast<const GgufTensor*>(linear.weight)->weight + first",
    ),
)
