"""Int4 drafts: packed at load time, unless that changes their predictions too much."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mcsd import kernels
from mcsd.cpu.draft_int4 import pack_int4
from mcsd.cpu.native_decoder import NativeDecoder
from mcsd.cpu.native_linear import NativeLinear
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.kernels import WeightFormat
from mcsd.loading.load import load, read_transformers
from mcsd.models import TokenLayout
from mcsd.models.draft_vocabulary import cut_vocabulary
from support.decoders import native_plan
from support.tiny import VOCABULARY, tiny

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")


def formats(weights: nn.Module) -> set[WeightFormat]:
    return {module.format for module in weights.modules() if isinstance(module, NativeLinear)}


def test_a_loaded_draft_is_in_int4_and_a_target_is_not(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)

    def loaded(dtype: torch.dtype, role: Role) -> set[WeightFormat]:
        return formats(load(tmp_path, CPU, plan_weights(CPU, dtype, role), role).model.weights)

    assert loaded(torch.bfloat16, Role.DRAFT) == {WeightFormat.W4A8}
    assert WeightFormat.W4A8 not in loaded(torch.bfloat16, Role.TARGET)
    assert not loaded(torch.float32, Role.DRAFT)


@pytest.mark.parametrize("cut", [False, True])
def test_a_draft_that_int4_changes_too_much_is_in_int8(cut: bool, tmp_path: Path) -> None:
    """With so large an output matrix, a few per cent of a weight change the distribution."""
    made = tiny("llama", seed=3)
    made.get_output_embeddings().weight.data *= 1000
    made.save_pretrained(tmp_path)
    network, chosen = read_transformers(tmp_path, torch.bfloat16)[0], None
    if cut:
        chosen = torch.arange(0, VOCABULARY, 2)
        save_file({"vocabulary": chosen.int()}, tmp_path / "vocabulary.safetensors")
        cut_vocabulary(network, chosen)
    plan = native_plan(WeightFormat.W8A8, torch.bfloat16)
    pack(network, plan)
    draft = load(tmp_path, CPU, plan_weights(CPU, torch.bfloat16, Role.DRAFT), Role.DRAFT).model
    assert formats(draft.weights) == {WeightFormat.W8A8}
    assert draft.precision == str(plan)
    tokens = torch.arange(20)[None]
    logits = []
    for model in (draft, NativeDecoder(network, "tiny", chosen, "", lambda: None)):
        cache = model.new_cache(1, 20)
        cache.add()
        logits.append(model.forward(tokens, TokenLayout.chain(20), cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("tokenizer", [None, lambda text: {"input_ids": []}, lambda text: {}])
def test_int4_is_tried_without_a_tokenizer_for_the_text(tokenizer: Any) -> None:
    network = tiny("llama").bfloat16()
    assert pack_int4(network, tokenizer, native_plan(WeightFormat.W4A8, torch.bfloat16))
    assert formats(network) == {WeightFormat.W4A8}
