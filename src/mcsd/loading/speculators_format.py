"""Writes EAGLE-3 heads in the format of speculators. `mcsd.loading.published_heads` reads them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsd.files import save_tensors, save_text
from mcsd.loading.catalog import entry_of, locate
from mcsd.models.draft_head import CONFIG_FILE, MAX_POSITIONS, WEIGHTS_FILE, DraftHead

_VERSION = "0.9.0"
"""Of speculators whose format it is."""

_FILES = {
    "feature_proj.": "fc.",
    "decoder.layers.": "layers.",
    "decoder.norm.": "norm.",
    "output_norm.": "norm.",
    "embed_tokens.": "embed_tokens.",
    "lm_head.": "lm_head.",
}
"""Beginnings of tensor names in `DraftHead`, and in the files."""


def save_eagle3_head(folder: Path, head: DraftHead, target: str, target_config: Any, steps_ahead: int) -> None:
    """Write a head of kind "eagle3" in bfloat16; its configuration last, so that a folder with one is complete.

    Args:
        folder: exists.
        head: the head.
        target: name, hub id or folder of its target.
        target_config: configuration of the target.
        steps_ahead: levels of a tree that it was trained on, which other programs draft by default.

    Raises:
        OutputFailed: a file cannot be written; none is left half-written.
    """
    config = head.config
    save_tensors(folder / WEIGHTS_FILE, _tensors(head), {"format": "pt"})
    layer = {**(config.layer_fields or _new_layers(head, target_config))}
    layer |= {"num_hidden_layers": config.num_layers, "vocab_size": config.target_vocab_size}
    verifier = {
        "name_or_path": _public_name(target),
        "architectures": getattr(target_config, "architectures", None) or [],
    }
    fields = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": steps_ahead}],
            "verifier": verifier,
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(config.hidden_layers),
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "norm_before_fc": config.feature_norm == "all",
        "fc_norm": config.feature_norm == "each",
        "target_hidden_size": config.target_hidden_size,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    save_text(folder / CONFIG_FILE, json.dumps(fields, indent=1) + "\n")


def _public_name(target: str) -> str | None:
    """The name by which other programs find the target, for its embeddings; None for an unknown GGUF file."""
    if entry := entry_of(target):
        return entry.hub
    location = locate(target)
    if location.kind == "folder":
        return str(Path(location.source).resolve())
    return location.source if location.kind == "hub" else None


def _new_layers(head: DraftHead, target_config: Any) -> dict[str, Any]:
    """The decoder layers of a new head, with the default rotary embeddings, as a configuration of transformers."""
    layer = head.config.decoder
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    fields = {name: getattr(layer, name) for name in (*names, "rms_norm_eps", "rope_theta")}
    fields |= {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    return fields | {"max_position_embeddings": getattr(target_config, "max_position_embeddings", MAX_POSITIONS)}


def _tensors(head: DraftHead) -> dict[str, Tensor]:
    """The tensors of the file, by name."""
    config, state = head.config, head.state_dict()
    vocabulary = state.pop("vocabulary").long()
    norm = state.pop("feature_norm.weight", None)
    tensors = {_name(key): tensor for key, tensor in state.items()}
    if norm is not None and config.feature_norm == "all":
        tensors["input_norm.weight"] = norm[0]
    elif norm is not None:
        tensors |= {f"fc_norm.{part}.weight": weight for part, weight in enumerate(norm)}
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    if config.vocab_size != config.target_vocab_size:
        known = torch.zeros(config.target_vocab_size, dtype=torch.bool, device=vocabulary.device)
        known[vocabulary] = True
        tensors |= {"d2t": vocabulary - torch.arange(len(vocabulary), device=vocabulary.device), "t2d": known}
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _name(key: str) -> str:
    return next(new + key.removeprefix(old) for old, new in _FILES.items() if key.startswith(old))
