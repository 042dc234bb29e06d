"""Draft heads before training."""

from typing import Any

from torch import Tensor, nn

from mcsd.distill.teacher import Teacher
from mcsd.models.draft_head import MAX_POSITIONS, DraftHead, HeadConfig
from mcsd.models.llama import LlamaConfig
from mcsd.models.protocol import DecoderModel

_INITIAL_STD = 0.02
"""Of the weights of decoder layers, as in transformers."""

_OUTPUT_SCALE = 0.3
"""Of the last norm, as a share of the target's hidden states: a new head is less certain than the target."""


def head_layers(kind: str, num_layers: int) -> tuple[int, ...]:
    """The layers of the target whose hidden states a new head reads: at one third, at two thirds, and the last.

    EAGLE-3 heads read the inputs of layers, so the last one is the input of the last layer. Its format wants distinct
    layers.
    """
    if kind == "eagle3":
        return tuple(dict.fromkeys((num_layers // 3, 2 * num_layers // 3, num_layers - 1)))
    return num_layers // 3, 2 * num_layers // 3, -1


def new_head(
    kind: str, target: DecoderModel, name: str, num_layers: int, teacher: Teacher, last_hidden: Tensor
) -> DraftHead:
    """A draft head with random layers. Its output matrix is the target's.

    Args:
        kind: "head" or "eagle3".
        target: the model that it drafts for.
        name: of the target.
        num_layers: decoder layers of the head.
        teacher: has the draft vocabulary and its output matrix.
        last_hidden: ``[N, H]``, the target's last hidden states at some tokens, for their scale.
    """
    is_eagle3 = kind == "eagle3"
    head = DraftHead(
        HeadConfig(
            target=name,
            target_vocab_size=target.vocab_size,
            hidden_size=teacher.hidden_size,
            hidden_layers=head_layers(kind, target.num_layers),
            num_layers=num_layers,
            vocab_size=len(teacher.vocabulary),
            kind="eagle3" if is_eagle3 else "mcsd",
            layer=_eagle3_layers(target.config, target.vocab_size, num_layers) if is_eagle3 else None,
            norm_before_residual=is_eagle3,
        )
    ).to(teacher.device)
    head.vocabulary.copy_(teacher.vocabulary)
    for module in head.decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_INITIAL_STD)
    if head.lm_head is not None:
        head.lm_head.weight.data.copy_(teacher.output_matrix)
    last_norm: Any = head.output_norm if is_eagle3 else head.decoder.norm
    last_norm.weight.data.copy_(_OUTPUT_SCALE * last_hidden.pow(2).mean(0).sqrt())
    return head


def _eagle3_layers(config: Any, vocab_size: int, num_layers: int) -> LlamaConfig:
    """Llama layers with the sizes of the target's, so that the KV caches of other programs fit both."""
    heads = config.num_attention_heads
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
    )
