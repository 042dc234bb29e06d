"""EAGLE-3 heads made of heads of kind "mcsd", before training.

A head of kind "mcsd" projects hidden state and embedding to its residual. A layer of EAGLE-3 reads the embedding in its
attention only. So each key-value head of the new layer serves two query heads: one attends as before; the other, by the
rotary embeddings, to its own position alone. The values of those others bring the projection to the residual.

What the new layer cannot compute as before is fitted to some texts by least squares: the projection, of values that are
not normalized by position; a smaller MLP; and features of the input of the last layer instead of its output.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.distill.batches import Batch
from mcsd.distill.head_learner import hidden_states_ahead
from mcsd.distill.teacher import Teacher
from mcsd.errors import InvalidOption
from mcsd.models.draft_head import DraftHead

_INTERMEDIATE = 1.5
"""Largest size of the MLP, as a share of the hidden size: its file has room for an output matrix then."""

_LEVELS = 3
"""Levels of a tree whose inputs the weights are fitted to."""

_PEAK = 40.0
"""Score of a position with itself in a query head that attends to nothing else."""

_RIDGE = 1e-3
"""Of least squares, as a share of the mean square of the regressors."""


def converted_layers(given: DraftHead, num_layers: int) -> tuple[int, ...]:
    """The layers whose inputs the EAGLE-3 head reads: those of the given head, with the last one for its output.

    Args:
        given: the head of kind "mcsd".
        num_layers: of the target.

    Raises:
        InvalidOption: the head has more than one decoder layer.
    """
    if given.config.num_layers != 1:
        raise InvalidOption(
            f"init has {given.config.num_layers} decoder layers; only a head with one becomes an EAGLE-3 head",
            "leave out --init",
        )
    return tuple(dict.fromkeys(num_layers - 1 if layer == -1 else layer for layer in given.config.hidden_layers))


@torch.no_grad()
def converted_head(given: DraftHead, layers: tuple[int, ...], teacher: Teacher, sample: Batch) -> DraftHead:
    """An EAGLE-3 head that proposes nearly what a head of kind "mcsd" proposes.

    Args:
        given: the head of kind "mcsd", in float32, on the teacher's device.
        layers: see `converted_layers`.
        teacher: has the draft vocabulary of the new head.
        sample: texts with the target's hidden states of ``layers``, and then the last ones.
    """
    config, size = given.config, given.config.hidden_size
    old: Any = given.decoder.layers[0]
    layer = replace(
        config.decoder,
        vocab_size=config.target_vocab_size,
        intermediate_size=min(config.decoder.intermediate_size, int(_INTERMEDIATE * size)),
        num_attention_heads=2 * config.num_heads,
    )
    head = DraftHead(
        replace(
            config,
            hidden_layers=layers,
            vocab_size=len(teacher.vocabulary),
            kind="eagle3",
            layer=layer,
            feature_norm="each",
            norm_before_residual=True,
            norm_output=True,
        )
    ).to(teacher.device)
    states = dict(zip((*layers, -1), sample.hidden_states.chunk(len(layers) + 1, dim=-1), strict=True))
    read = torch.cat([states[number] for number in config.hidden_layers], dim=-1)
    inputs, activations = _activations(given, teacher, replace(sample, hidden_states=read))
    new: Any = head.decoder.layers[0]
    _convert_attention(old, new, given.input_proj, inputs)
    _prune_mlp(old.mlp, new.mlp, activations)
    new.post_attention_layernorm.load_state_dict(old.post_attention_layernorm.state_dict())
    head.decoder.norm.load_state_dict(given.decoder.norm.state_dict())
    features = head.feature_norm(torch.cat([states[number] for number in layers], dim=-1))
    feature_proj: Any = head.feature_proj
    feature_proj.weight.copy_(
        _least_squares(*(part.flatten(0, 1)[sample.positions] for part in (features, given.project_features(read))))
    )
    lm_head: Any = head.lm_head
    lm_head.weight.copy_(teacher.output_matrix)
    head.vocabulary.copy_(teacher.vocabulary)
    return head


def _activations(given: DraftHead, teacher: Teacher, batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, 2 H]`` of the input projection and ``[N, I]`` of the last projection of the MLP, at all levels."""
    layer: Any = given.decoder.layers[0]
    seen: dict[nn.Module, list[Tensor]] = {given.input_proj: [], layer.mlp.down_proj: []}

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen[module].append(inputs[0].flatten(0, 1)[batch.positions])

    hooks = [module.register_forward_pre_hook(keep) for module in seen]
    hidden_states_ahead(given, teacher, batch, batch.hidden_states, _LEVELS)
    for hook in hooks:
        hook.remove()
    inputs, activations = (torch.cat(parts) for parts in seen.values())
    return inputs, activations


def _convert_attention(old: Any, new: Any, projection: Any, inputs: Tensor) -> None:
    """Set the attention of an EAGLE-3 layer.

    Args:
        old, new: decoder layers.
        projection: to the residual of the old one.
        inputs: ``[N, 2 H]`` of the projection, hidden states and embeddings.
    """
    size, head_dim = len(projection.weight), old.self_attn.head_dim
    joined = projection(inputs)
    # EAGLE-3 reads the embedding first. Its norms of both are the ones before the projection.
    inputs, weight = inputs.roll(size, dims=1), projection.weight.roll(size, dims=1)
    attended = old.input_layernorm.weight[:, None] * weight / joined.pow(2).mean(-1).sqrt().mean()
    query, key, value = (
        getattr(old.self_attn, name).weight.view(-1, head_dim, size) for name in ("q_proj", "k_proj", "v_proj")
    )
    queries, keys = (query @ attended)[:, None].repeat(1, 2, 1, 1), key @ attended
    queries[:, 1] = 0
    # A number that is nearly constant, in the dimensions that rotate fastest: their product peaks at distance 0.
    fast = max(1, head_dim // 16)
    constant = _least_squares(inputs, torch.ones_like(inputs[:, :1]))
    constant *= (_PEAK * head_dim**0.5 / fast) ** 0.5
    for start in (0, head_dim // 2):
        queries[:, 0, start : start + fast] = 0
        keys[:, start : start + fast] = 0
    queries[:, 1, :fast] = keys[:, :fast] = constant
    # Orthonormal bases of what the value heads read, to invert all of them together.
    basis, triangle = torch.linalg.qr(value.mT)
    values = basis.mT.flatten(0, 1) @ attended
    output = old.self_attn.o_proj.weight.view(size, -1, head_dim)
    projected = _least_squares(inputs @ values.T, joined - inputs[:, size:]).view(size, -1, head_dim)
    outputs = torch.stack([torch.einsum("nhd,hed->nhe", output, triangle), projected], dim=2)
    new.self_attn.q_proj.weight.copy_(queries.flatten(0, 2))
    new.self_attn.k_proj.weight.copy_(keys.flatten(0, 1))
    new.self_attn.v_proj.weight.copy_(values)
    new.self_attn.o_proj.weight.copy_(outputs.flatten(1))


def _prune_mlp(old: Any, new: Any, activations: Tensor) -> None:
    """Keep the neurons that contribute most to the output, and fit their last projection ``[H, I]`` to all of it."""
    weight = old.down_proj.weight
    contribution = activations.pow(2).mean(0) * weight.pow(2).sum(0)
    kept = contribution.argsort(descending=True)[: new.down_proj.in_features]
    new.gate_proj.weight.copy_(old.gate_proj.weight[kept])
    new.up_proj.weight.copy_(old.up_proj.weight[kept])
    new.down_proj.weight.copy_(_least_squares(activations[:, kept], activations @ weight.T))


def _least_squares(regressors: Tensor, values: Tensor) -> Tensor:
    """The matrix ``[V, R]`` that takes regressors ``[N, R]`` nearest to values ``[N, V]``."""
    gram = regressors.T @ regressors
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, regressors.T @ values)
    return solution.T
