"""Networks whose linear layers and embeddings multiply with the weights of a GGUF file as they are.

Nothing is dequantized. The kernels read a copy of the weights in another order; embeddings are read from the file. The
first load writes the configuration and the tokenizer, which transformers takes seconds to read from the file, to the
cache folder.
"""

import json
import os
import re
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mcsd.cpu.gguf_linear import GgufEmbedding, GgufLinear, GgufTensor
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.errors import McsdWarning, WeightsCorrupt
from mcsd.kernels import WeightFormat
from mcsd.loading.catalog import CATALOG, Location
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.gguf_file import GgufFile, TensorInfo
from mcsd.loading.pretrained import read_config, read_tokenizer
from mcsd.models.llama import LlamaConfig, LlamaForCausalLM

_FLOAT32 = 0
_OTHER_FLOATS = {1, 30}
"""float16 and bfloat16."""

_ARCHITECTURES = {"llama", "qwen2"}

_BLOCKS = {
    **{_FLOAT32: (1, 4), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{12: (256, 144), 13: (256, 176), 14: (256, 210)},
}
"""Weights and bytes of a block: of float32, and of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K, which the kernels
read."""

_TENSORS = {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}
_LAYER_TENSORS = {
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    **{"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
"""Tensors of the file by modules of the network."""

_KNOWN_NAME = re.compile(r"(token_embd|output|output_norm|blk\.\d+\.[a-z_]+)\.(weight|bias)")

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ROTATED = {"q_proj", "k_proj"}


def keeps_weights(model: str | Path) -> bool:
    """Whether a model is a GGUF file whose weights the kernels can multiply with as they are. Nothing is fetched.

    A broken file counts as one: reading it says what is wrong.
    """
    if model in CATALOG:
        return True
    path = _path_of(model)
    try:
        return path is not None and _is_known(GgufFile(path))
    except WeightsCorrupt:
        return True


def warn_of_unread_types(model: str | Path) -> None:
    """Warn if a GGUF file, which is not of the catalog, has quantized types that no kernel reads."""
    path = _path_of(model)
    types = set() if path is None else {info.type for info in GgufFile(path).tensors.values()}
    if unread := types - _BLOCKS.keys() - _OTHER_FLOATS:
        names = ", ".join(map(str, sorted(unread)))
        warnings.warn(f"{model} is dequantized: no kernel reads ggml types {names}", McsdWarning, stacklevel=4)


def _path_of(model: str | Path) -> Path | None:
    """The path of a GGUF file; None if there is no such file."""
    # os.path, because it answers False, rather than raise, for names that no file can have.
    path = os.path.expanduser(model)
    return Path(path) if path.lower().endswith(".gguf") and os.path.isfile(path) else None


def _is_known(file: GgufFile) -> bool:
    """Whether architecture, names and types of the tensors are known here."""
    types = {info.type for info in file.tensors.values()}
    names = all(map(_KNOWN_NAME.fullmatch, file.tensors))
    return types <= _BLOCKS.keys() and names and file.architecture in _ARCHITECTURES


def read_gguf_network(location: Location, dtype: torch.dtype) -> tuple[LlamaForCausalLM, Any | None] | None:
    """Network and tokenizer of a GGUF file that `keeps_weights`; None if only transformers can compute the network.

    Args:
        location: of the file.
        dtype: of hidden states.

    Raises:
        WeightsCorrupt: the file is broken.
        UnsupportedModel: transformers does not know its architecture.
    """
    path = Path(location.source, location.file or "")
    file = GgufFile(path)
    if not _is_known(file):
        return None
    for name in file.tensors:
        _bytes_of(file, name)
    cache = GgufCache(path)
    fields, generation_config, tokenizer = _describe(location, cache)
    try:
        config = LlamaConfig.from_transformers(fields)
    except (KeyError, TypeError, ValueError) as error:
        cache.delete()
        raise WeightsCorrupt(f"{path}: its configuration is broken: {error!s:.200}", "fetch the file again") from error
    if config is None:
        return None
    with torch.device("meta"):
        network = LlamaForCausalLM(config, generation_config)
    weights = _Weights(file, network, config, rotated=fields["model_type"] == "llama")
    return (weights.load(dtype), tokenizer) if weights.are_complete() else None


def _describe(location: Location, cache: GgufCache) -> tuple[dict[str, Any], GenerationConfig, Any | None]:
    """The fields of the configuration, the generation configuration and the tokenizer of a file."""
    if cache.is_current():
        try:
            fields = json.loads((cache.folder / "config.json").read_text())
            generation_config = GenerationConfig.from_pretrained(cache.folder, local_files_only=True)
            return fields, generation_config, read_tokenizer(Location("folder", str(cache.folder)))
        except (OSError, ValueError, WeightsCorrupt):
            cache.delete()
    config, tokenizer = read_config(location), read_tokenizer(location)
    try:
        generation_config = GenerationConfig.from_pretrained(location.source, local_files_only=True)
    except OSError:
        generation_config = GenerationConfig.from_model_config(config)

    def save(part: Path) -> None:
        config.save_pretrained(part)
        generation_config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)

    cache.write_files(save)
    return json.loads(config.to_json_string()), generation_config, tokenizer


class _Weights:
    """The tensors of a file as the parameters of a network.

    Args:
        file: the file.
        network: on the meta device.
        config: of the network.
        rotated: whether the file has the rows of query and key heads in the order of rotated pairs.
    """

    def __init__(self, file: GgufFile, network: LlamaForCausalLM, config: LlamaConfig, rotated: bool) -> None:
        self._file, self._network, self._config, self._rotated = file, network, config, rotated
        self._shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if config.tie_word_embeddings:
            del self._shapes["lm_head.weight"]

    def are_complete(self) -> bool:
        """Whether the file has the tensors of the network and no others, in types and an order that are known here.

        Raises:
            WeightsCorrupt: it lacks some, or they have another shape.
        """
        expected = {_tensor_name(name): shape for name, shape in self._shapes.items()}
        for name, shape in expected.items():
            found = self._file.tensors.get(name)
            if found is None or found.shape != shape:
                raise WeightsCorrupt(
                    f"{self._file.path}: tensor {name} is missing or not of the shape {shape}", "fetch the file again"
                )
        biased = any(name.endswith("attn_q.bias") for name in expected)
        readable = all(map(_is_readable, self._file.tensors.values()))
        return readable and self._file.tensors.keys() == expected.keys() and not (self._rotated and biased)

    def load(self, dtype: torch.dtype) -> LlamaForCausalLM:
        """The network with the weights of the file."""
        meta = torch.device("meta")
        tensors = {
            name: self._vector(name).to(dtype) if len(shape) == 1 else torch.empty(shape, device=meta)
            for name, shape in self._shapes.items()
        }
        network = LlamaForCausalLM.from_tensors(self._config, self._network.generation_config, tensors)
        pack(network, WeightPlan(dtype, WeightFormat.GGUF, packed=True, native=True), self._linear)
        network.model.set_submodule("embed_tokens", GgufEmbedding(self._matrix("model.embed_tokens"), dtype))
        return network

    def _linear(self, path: str, linear: nn.Linear) -> GgufLinear:
        parent, _, name = path.rpartition(".")
        modules = [f"{parent}.{part}" for part in _FUSED[name]] if name in _FUSED else [path]
        if path == "lm_head" and self._config.tie_word_embeddings:
            modules = ["model.embed_tokens"]
        packed = GgufLinear([self._matrix(module).packed() for module in modules], linear.bias)
        # At once, so that the memory of the file and that of its packed copy do not add up.
        self._file.release()
        return packed

    def _matrix(self, module: str) -> GgufTensor:
        name = _tensor_name(f"{module}.weight")
        info = self._file.tensors[name]
        rotated = self._rotated and module.rpartition(".")[2] in _ROTATED
        size = self._config.head_dim if rotated else 0
        outputs, inputs = info.shape
        return GgufTensor(_bytes_of(self._file, name), info.type, outputs, inputs, size)

    def _vector(self, parameter: str) -> Tensor:
        return _bytes_of(self._file, _tensor_name(parameter)).clone().view(torch.float32)


def _tensor_name(parameter: str) -> str:
    """The name in the file of a parameter of the network."""
    module, _, kind = parameter.rpartition(".")
    parts = module.split(".")
    layer = parts[2] if len(parts) > 3 else None
    return f"{_TENSORS[parts[-1]]}.{kind}" if layer is None else f"blk.{layer}.{_LAYER_TENSORS[parts[-1]]}.{kind}"


def _is_readable(info: TensorInfo) -> bool:
    """Whether a tensor is a vector of float32, or a matrix of whole blocks."""
    is_vector = len(info.shape) == 1
    return is_vector == (info.type == _FLOAT32) and info.shape[-1] % _BLOCKS[info.type][0] == 0


def _bytes_of(file: GgufFile, name: str) -> Tensor:
    """The bytes of a tensor, uint8.

    Raises:
        WeightsCorrupt: the file ends before.
    """
    info = file.tensors[name]
    block, block_bytes = _BLOCKS[info.type]
    return file.bytes_of(name, prod(info.shape) // block * block_bytes)
