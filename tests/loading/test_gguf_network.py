"""Networks on the weights of a GGUF file: what transformers computes with the dequantized file, without a copy."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

import mcsd
from mcsd import errors, kernels
from mcsd.cpu.gguf_linear import GgufLinear
from mcsd.cpu.native_decoder import NativeDecoder
from mcsd.cpu.reference import quantize_reference
from mcsd.cpu.weight_plan import Role, has_int8_gemm, plan_weights
from mcsd.kernels import WeightFormat
from mcsd.loading.catalog import path_of, pull
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.gguf_network import keeps_weights, warn_of_unread_types
from mcsd.loading.load import load
from mcsd.models import TokenLayout
from mcsd.models.compatibility import as_model
from mcsd.models.prefill import prefill, score_text
from mcsd.tree import TreeShape
from support.decoders import outputs
from support.gguf_files import HIDDEN, dequantized, write_gguf

pytestmark = pytest.mark.skipif(not kernels.has_kernels(), reason="no kernels for this CPU")

CPU = torch.device("cpu")
PLAN = plan_weights(CPU, torch.float32, Role.TARGET, in_file=True)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    return tmp_path / "model.gguf"


def linears(model: Any) -> list[GgufLinear]:
    return [module for module in model.weights.modules() if isinstance(module, GgufLinear)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_network_computes_what_transformers_does(path: Path, architecture: str, tied: bool) -> None:
    write_gguf(path, architecture, tied=tied)
    model = load(path, CPU, PLAN).model
    assert isinstance(model, NativeDecoder)
    assert len(linears(model)) == 2 * 4 + 1
    assert not list((path.parent / "home").glob("**/*.safetensors"))
    reference = quantize_reference(dequantized(path, torch.float32), PLAN)
    theirs = as_model(reference)
    # Texts of one token have no earlier one whose rounding may differ.
    alone = [(score_text(model, [token]).logits, score_text(theirs, [token]).logits) for token in range(16)]
    pairs = [*alone, *zip(outputs(model), outputs(theirs), strict=True)]
    apart = torch.cat([((one - other).norm(dim=-1) / other.norm(dim=-1)).flatten() for one, other in pairs])
    # An activation halfway between two integers may be rounded either way. Then all later tokens of its text differ.
    assert apart.max() <= 0.05
    assert apart.quantile(0.1) <= 1e-5
    assert apart[: len(alone)].median() <= 1e-5


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("context", [1, 13, 40])
def test_a_token_in_a_tree_has_the_last_bits_of_its_path_alone(path: Path, architecture: str, context: int) -> None:
    """So a seed gives one text with any tree: an activation that differs in its last bit may be rounded otherwise."""
    write_gguf(path, architecture)
    model = load(path, CPU, PLAN).model
    torch.manual_seed(context)
    shape = TreeShape.parse("3x2x2x1")
    text, nodes = (
        torch.randint(0, model.vocab_size, (context,)).tolist(),
        torch.randint(0, model.vocab_size, (len(shape),)),
    )

    def read(tokens: list[int], layout: TokenLayout) -> Tensor:
        cache = model.new_cache(1, 128)
        prefill(model, cache, cache.add(), text[:-1])
        return model.forward(torch.tensor([tokens]), layout, cache).logits[0]

    together = read([text[-1], *nodes.tolist()], TokenLayout.tree(shape, CPU))
    for node in range(len(shape)):
        path_to = [place for place in shape.paths[1 + node].tolist() if place >= 0]
        alone = read([text[-1], *nodes[path_to].tolist()], TokenLayout.chain(1 + len(path_to), CPU))
        assert torch.equal(alone[-1], together[1 + node])
    committed = score_text(model, [*text, *nodes[path_to].tolist()]).logits[0, -1]
    assert torch.equal(committed, together[-1])


def test_it_is_the_default_of_a_gguf_file(path: Path) -> None:
    write_gguf(path)
    engine = mcsd.Engine.load(target=str(path), draft="ngram", dtype="float32", device="cpu")
    assert engine.target.precision == "float32, GGUF weights, native kernels"
    output = engine.generate([[1, 2, 3]], temperature=0, max_new_tokens=20)
    network, text = quantize_reference(dequantized(path, torch.float32), PLAN), [1, 2, 3]
    # Greedy tokens of transformers; the best logits of this network are never closer than its rounding.
    for token in output[0].token_ids:
        scores = network(torch.tensor([text])).logits[0, -1]
        assert scores[token] >= scores.max() - 1e-2
        text.append(token)
    assert len(text) == 23


def test_the_plan_of_files_and_of_drafts_of_such_a_target() -> None:
    assert PLAN.format is WeightFormat.GGUF
    assert plan_weights(CPU, torch.float32, Role.TARGET, in_file=False).format is None
    assert plan_weights(torch.device("meta"), torch.float32, Role.TARGET, in_file=True).format is None
    for role, format in (Role.HEAD, WeightFormat.W8A8), (Role.DRAFT, WeightFormat.W4A8):
        plan = plan_weights(CPU, torch.float32, role, target=WeightFormat.GGUF)
        assert plan.format is (format if has_int8_gemm(CPU) and kernels.available() else plan.format)
        assert plan.packed


def test_a_head_of_such_a_target_has_quantized_weights() -> None:
    engine: Any = mcsd.Engine.load(target="smollm2-135m", device="cpu")
    assert engine.target.precision == "float32, GGUF weights, native kernels"
    assert re.fullmatch(r"float32, (GGUF|W8A8) weights, (native kernels|oneDNN)", engine.drafter.model.precision)


def test_a_second_load_reads_nothing_with_transformers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(path)
    first = load(path, CPU, PLAN).model

    def unneeded(*_: Any, **__: Any) -> None:
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr("mcsd.loading.gguf_network.read_config", unneeded)
    second = load(path, CPU, PLAN).model
    assert all(map(torch.equal, outputs(first), outputs(second)))
    assert first.eos_token_ids == second.eos_token_ids


def test_a_broken_copy_of_the_configuration_is_written_again(path: Path) -> None:
    write_gguf(path)
    load(path, CPU, PLAN)
    config = GgufCache(path).folder / "config.json"
    written = config.read_text()
    config.write_text("{")
    load(path, CPU, PLAN)
    assert config.read_text() == written


def unused(kind: Type) -> Any:
    """Adds a matrix of a type to a file."""
    data = {Type.F16: np.zeros((32, 32), np.float16), Type.Q2_K: np.zeros((1, 84), np.uint8)}[kind]
    return lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", data, raw_dtype=kind)


def test_float_matrices_are_left_to_transformers(path: Path) -> None:
    write_gguf(path, change=unused(Type.F16))
    assert not keeps_weights(path)
    engine = mcsd.Engine.load(target=str(path), draft="ngram", device="cpu")
    assert "GGUF" not in engine.target.precision


def test_other_types_are_dequantized_with_a_warning(path: Path) -> None:
    write_gguf(path, change=unused(Type.Q2_K))
    with pytest.warns(errors.McsdWarning, match=r"model.gguf is dequantized: no kernel reads ggml types 10"):
        warn_of_unread_types(path)
    assert not keeps_weights(path)
    for silent in ("smollm2-135m", "org/model", path.parent / "no.gguf", "x" * 5000 + ".gguf"):
        warn_of_unread_types(silent)


def test_a_float_draft_of_such_a_target(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dequantized, and rounded to Q8_0 where no int8 or int4 kernel runs."""
    monkeypatch.setattr("mcsd.cpu.weight_plan.has_int8_gemm", lambda device: False)
    write_gguf(path)
    draft = path.parent / "draft.gguf"
    write_gguf(draft, change=unused(Type.F16))
    engine = mcsd.Engine.load(target=str(path), draft=str(draft), tree="2x1", device="cpu")
    assert {module.tensors[0].type for module in linears(engine.drafter.model)} == {int(Type.Q8_0)}  # type: ignore[attr-defined]
    assert len(engine.generate([[1, 2, 3]], max_new_tokens=8, ignore_eos=True)[0].token_ids) == 8


def test_a_draft_is_rounded_to_four_bits_if_that_barely_changes_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(path, types=(Type.Q8_0, Type.Q4_K))

    def types(role: Role) -> set[int]:
        return {tensor.type for layer in linears(load(path, CPU, PLAN, role).model) for tensor in layer.tensors}

    as_it_is = {int(Type.Q8_0), int(Type.Q4_K)}
    assert types(Role.TARGET) == as_it_is
    assert types(Role.DRAFT) == {int(Type.Q4_0), int(Type.Q4_K)}
    assert load(path, CPU, PLAN, Role.DRAFT).model.precision == "float32, GGUF weights, native kernels, in 4 bits"
    kept = outputs(load(path, CPU, PLAN).model)
    monkeypatch.setattr("mcsd.cpu.draft_int4._MIN_OVERLAP", 1.0)
    assert types(Role.DRAFT) == as_it_is
    assert all(map(torch.equal, outputs(load(path, CPU, PLAN, Role.DRAFT).model), kept))


def test_the_reference_of_verification_rounds_activations_too(path: Path) -> None:
    torch.manual_seed(0)
    write_gguf(path, "qwen2")
    model: Any = load(path, CPU, PLAN).model
    activations = torch.randn(40, HIDDEN)
    ours = linears(model)[0](activations)[:, :HIDDEN]
    rounded, exact = (
        network.model.layers[0].self_attn.q_proj(activations)
        for network in (model.reference(), dequantized(path, torch.float32))
    )
    assert (ours - rounded).norm() < 0.05 * (ours - exact).norm()


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.ffn_gate.lora"])
def test_a_tensor_of_another_kind_of_network(path: Path, name: str) -> None:
    """Such as the frequencies of Llama 3's rotary embeddings: transformers decides what to do with it."""
    write_gguf(path, change=lambda writer: writer.add_tensor(name, np.ones(32, np.float32)))
    assert not keeps_weights(path)


def test_a_tensor_that_the_network_does_not_have(path: Path) -> None:
    write_gguf(path, change=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(HIDDEN, np.float32)))
    assert keeps_weights(path)
    assert not linears(load(path, CPU, PLAN).model)


def test_what_keeps_its_weights(path: Path) -> None:
    assert not keeps_weights(path)
    assert keeps_weights("smollm2-135m")
    assert not keeps_weights("org/model")
    assert not keeps_weights("x" * 5000 + ".gguf")
    path.write_bytes(b"GGUF")
    assert keeps_weights(path)
    with pytest.raises(errors.WeightsCorrupt, match="ends within the header"):
        load(path, CPU, PLAN)
    write_gguf(path, "qwen3")
    assert not keeps_weights(path)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_tensors_that_do_not_fit(path: Path, change: str) -> None:
    write_gguf(path)
    data = path.read_bytes()
    if change == "missing":
        data = data.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight")
    else:
        at = data.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4
        data = data[:at] + HIDDEN.to_bytes(8, "little") + data[at + 8 :]
    path.write_bytes(data)
    with pytest.raises(errors.WeightsCorrupt, match=r"tensor blk.1.ffn_\w+.weight is missing or not of the shape"):
        load(path, CPU, PLAN)


def test_a_truncated_file(path: Path) -> None:
    write_gguf(path)
    load(path, CPU, PLAN)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(errors.WeightsCorrupt, match="ends within tensor"):
        load(path, CPU, PLAN)


@pytest.mark.thorough
def test_distributions_of_smollm2() -> None:
    """Total variation from the dequantized file in float32; ``docs/precision.md`` has measurements."""
    pull("smollm2-135m")
    path = path_of("smollm2-135m")
    loaded = load(path, CPU, PLAN)
    tokens = loaded.tokenizer((Path(__file__).parents[2] / "README.md").read_text()[:800])["input_ids"]  # type: ignore[misc]
    ours = score_text(loaded.model, tokens).logits[0].softmax(-1)
    theirs = score_text(as_model(dequantized(path, torch.float32)), tokens).logits[0].softmax(-1)
    distance = (ours - theirs).abs().sum(-1) / 2
    assert distance.mean() < 0.04
    assert distance.max() < 0.3
