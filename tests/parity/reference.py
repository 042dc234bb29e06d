"""The logits of speculators' own EAGLE-3 model, in its environment: see `parity.run`.

Every argument is a folder with a head, and with ``inputs.safetensors``: the target's hidden states ``[1, T, F]``,
tokens ``[1, T]`` and the target's embeddings. The logits of three steps, ``[3, T, K]``, go into its
``logits.safetensors``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

STEPS = 3


def read(folder: Path) -> Any:
    """The model of a folder; one in the format of SpecForge is given the names of speculators."""
    fields = json.loads((folder / "config.json").read_text())
    if "speculators_model_type" in fields:
        return Eagle3DraftModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    flags = {name: fields[name] for name in ("norm_before_residual", "draft_vocab_size") if name in fields}
    layer = {name: value for name, value in fields.items() if name not in ("architectures", "eagle_config", *flags)}
    ids = [2, 4, 5]  # Only their number is read.
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(transformer_layer_config=layer, eagle_aux_hidden_state_layer_ids=ids, **flags)
    )
    tensors = load_file(folder / "model.safetensors")
    report = model.load_state_dict(
        {name.replace("midlayer", "layers.0"): tensor for name, tensor in tensors.items()}, strict=False
    )
    assert not report.unexpected_keys, report
    return model


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """The logits of three chained steps of every prefix of a text."""
    inputs = load_file(folder / "inputs.safetensors")
    model = read(folder).eval()
    model._attn_impl = model.config.transformer_layer_config._attn_implementation = "eager"
    from speculators.models.attention import create_float_mask

    model._create_mask_fn = create_float_mask
    for layer in model.layers:
        layer.self_attn.config._attn_implementation = "eager"
    if "embed_tokens.weight" not in load_file(folder / "model.safetensors"):
        model.embed_tokens.weight.data = inputs["embeddings"]
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    documents = torch.zeros_like(inputs["tokens"])
    model(inputs["states"], inputs["tokens"], documents, ttt_steps=STEPS)
    return torch.stack(seen)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        save_file({"logits": logits(Path(argument))}, Path(argument) / "logits.safetensors")
