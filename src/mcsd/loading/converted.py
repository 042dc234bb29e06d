"""Reading the converted copy of a GGUF file without the modelling code of transformers, which takes long to import."""

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig

from mcsd.errors import WeightsCorrupt
from mcsd.loading.catalog import Location
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.pretrained import read_tokenizer, weights_too_large
from mcsd.models.llama import LlamaConfig, LlamaForCausalLM


def read_converted(cache: GgufCache, device: torch.device) -> tuple[LlamaForCausalLM, Any | None] | None:
    """The network, on its device, and the tokenizer of a copy; None if only transformers can compute such a network.

    Raises:
        WeightsCorrupt: the copy is broken.
        OutOfMemory: the device does not have the memory for its weights.
    """
    folder = cache.folder
    try:
        config = LlamaConfig.from_transformers(json.loads((folder / "config.json").read_text()))
        if config is None:
            return None
        generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        tensors = load_file(folder / "model.safetensors", device=str(device))
        network = LlamaForCausalLM.from_tensors(config, generation_config, tensors)
    except torch.OutOfMemoryError as error:
        raise weights_too_large(folder, device) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise WeightsCorrupt(f"{folder} cannot be read: {error!s:.200}", "delete it: it is written again") from error
    return network, read_tokenizer(Location("folder", str(folder)))
