"""Small GGUF files with quantized matrices, written by the gguf package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, GgufConfig

TYPES = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K)
"""The types that the kernels read."""

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 512, 4, 2, 2, 96
LAYER = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def random_blocks(kind: Type, outputs: int, inputs: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Blocks of random bits, uint8 ``[outputs, bytes of a row]``, whose weights are some .05 large, of both signs."""
    block, size = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (outputs * inputs // block, size), dtype=np.uint8)
    steps = {Type.Q8_0: 64, Type.Q6_K: 1500, Type.Q4_K: 250, Type.Q5_K: 500}.get(kind, 8)
    scales = generator.uniform(0.5, 1.5, (len(blocks), 1)) * 0.05 / steps
    # Minimums that bring the weights to a mean of about zero.
    minimums = scales * {Type.Q4_1: -7.5, Type.Q5_1: -15.5, Type.Q4_K: 7.5, Type.Q5_K: 15.5}.get(kind, 0)
    halves = np.concatenate([scales, minimums], axis=1).astype(np.float16).view(np.uint8)
    if kind is Type.Q6_K:
        blocks[:, -2:] = halves[:, :2]
    else:
        count = 4 if kind in (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K) else 2
        blocks[:, :count] = halves[:, :count]
    return blocks.reshape(outputs, -1)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    types: tuple[Type, ...] = TYPES,
    tied: bool = True,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    change: Any = None,
) -> None:
    """A network with random matrices, whose types repeat in this order.

    Args:
        path: of the file.
        architecture: "llama" or "qwen2".
        types: of its matrices.
        tied: whether it has no output matrix.
        vocabulary: its tokens.
        seed: of the weights.
        change: called with the writer before it writes.
    """
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    shapes = {"token_embd": (vocabulary, HIDDEN)} | ({} if tied else {"output": (vocabulary, HIDDEN)})
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()}
    for i, (name, shape) in enumerate(shapes.items()):
        kind = types[i % len(types)]
        writer.add_tensor(f"{name}.weight", random_blocks(kind, *shape, generator), raw_dtype=kind)
    norms = ["output_norm", *(f"blk.{layer}.{norm}" for layer in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    if architecture == "qwen2":
        for name in [f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ("attn_q", "attn_k", "attn_v")]:
            size = LAYER[name.rpartition(".")[2]][0]
            writer.add_tensor(f"{name}.bias", generator.uniform(-0.5, 0.5, size).astype(np.float32))
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(path: Path, dtype: torch.dtype) -> Any:
    """The network of a file as transformers dequantizes it."""
    options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True), "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
