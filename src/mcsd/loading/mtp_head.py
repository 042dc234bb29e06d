"""The multi-token-prediction layer that comes with a model, as a draft head (DeepSeek-V3, arXiv 2412.19437).

It reads what an EAGLE-1 head reads: the embedding of a token, and the target's last hidden state before it. Its decoder
layer is one of the target's own class, whose attention in a tree the target's self-check has shown to be right.
Deeper in a tree it reads its own output, so models with a layer for each position ahead are refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mcsd.errors import UnsupportedModel, WeightsCorrupt
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.models.protocol import DecoderModel
from mcsd.models.transformers import TransformersModel, cache_argument

_OTHER_DRAFT = "use an EAGLE-3 head, a draft model, or ngram"

_OTHER_FORMS = {
    "mtp_hidden_states_first": "joins hidden states and embeddings in another order",
    "chain_hidden_post_norm": "shares a norm between its layers",
    "logits_mup_width_multiplier": "scales its logits",
}
"""Fields of configurations whose layers compute something else."""


def load_mtp_head(target: DecoderModel) -> DraftHead:
    """Load the multi-token-prediction layer of a target.

    Raises:
        UnsupportedModel: the target has none, several, or one of another form.
        WeightsCorrupt: its weights cannot be read.
    """
    network: Any = target.network if isinstance(target, TransformersModel) else None
    config = None if network is None else network.config.get_text_config()
    count = getattr(config, "num_mtp_layers", None)
    if network is None or config is None or not count:
        raise _refused(target, "has no multi-token-prediction layers that transformers knows")
    if count != 1:
        raise _refused(target, f"has {count} multi-token-prediction layers, one for each position ahead")
    for name, reason in _OTHER_FORMS.items():
        if getattr(config, name, None):
            raise _refused(target, f"has a multi-token-prediction layer that {reason}")
    if set(getattr(config, "mtp_layer_types", None) or ()) - {"full_attention"}:
        raise _refused(target, "has a multi-token-prediction layer without full attention")
    from transformers.modeling_layers import MtpModel

    try:
        mtp: Any = MtpModel.from_pretrained(network, device_map={"": network.device})
    except Exception as error:  # Of any type, for weights that are missing or broken.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsCorrupt(f"draft mtp of {target.name} cannot be read: {reason:.200}", _OTHER_DRAFT) from error
    if mtp.rotary_emb is None or mtp.has_per_layer_rope or hasattr(network.get_input_embeddings(), "embed_norm"):
        raise _refused(target, "has a multi-token-prediction layer with embeddings of its own kind")
    return _as_head(mtp, target, cache_argument(network))


def _refused(target: DecoderModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"draft mtp: {target.name} {reason}", _OTHER_DRAFT)


def _as_head(mtp: Any, target: DecoderModel, cache_name: str) -> DraftHead:
    (layer,) = mtp.layers
    size, hidden_size = target.vocab_size, mtp.config.hidden_size
    with torch.device("meta"):
        head = DraftHead(HeadConfig(target.name, size, hidden_size, (-1,), 1, size, kind="eagle"))
    head.vocabulary = torch.arange(size, dtype=torch.int32)
    head.input_norm, head.input_proj = _PairNorm(layer.enorm, layer.hnorm), layer.eh_proj
    head.decoder = _Decoder(layer, mtp.rotary_emb, cache_name)  # type: ignore[assignment]
    return head.requires_grad_(False)


class _PairNorm(nn.Module):
    """Normalizes embeddings and hidden states ``[..., 2 H]``, each by a norm of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList([first, second])

    def forward(self, pair: Tensor) -> Tensor:
        parts = zip(self.norms, pair.chunk(2, dim=-1), strict=True)
        return torch.cat([norm(part) for norm, part in parts], dim=-1)


class _Decoder(nn.Module):
    """The decoder layer of a multi-token-prediction layer, called as `mcsd.models.llama.LlamaModel`."""

    def __init__(self, mtp_layer: Any, rotary: nn.Module, cache_name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mtp_layer.mtp_block])
        self.norm: nn.Module = mtp_layer.post_norm
        # Not a part of this module: it is the target's.
        self._rotary, self._cache_name = (rotary,), cache_name

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor, cache: Any = None) -> list[Tensor]:
        angles = self._rotary[0](hidden, position_ids=positions)
        options = {"attention_mask": mask, "position_ids": positions, self._cache_name: cache}
        return [self.norm(self.layers[0](hidden, position_embeddings=angles, **options))]
