"""Distributions of networks on GGUF weights as they are, against the file as the gguf package dequantizes it.

The reference rounds activations to int8 in torch. Most texts agree to 1e-6. In one of twenty the kernels round an
activation that is halfway between two integers the other way: it agrees to some hundredths.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

import mcsd
from laws.test_exact_engine import as_network, check, engine_law, target_law
from mcsd import kernels
from mcsd.cpu.reference import quantize_reference
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.loading.load import load
from mcsd.models.compatibility import as_model
from mcsd.models.prefill import score_text
from support.chisquare import SEED
from support.gguf_files import TYPES, VOCABULARY, dequantized, write_gguf

pytestmark = pytest.mark.skipif(not kernels.has_kernels(), reason="no kernels for this CPU")

CPU = torch.device("cpu")


PLAN = plan_weights(CPU, torch.float32, Role.TARGET, in_file=True)


def native(path: Path) -> Any:
    return load(path, CPU, PLAN).model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", TYPES)
def test_distributions_of_every_type(
    kind: Type, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    write_gguf(tmp_path / "model.gguf", architecture, types=(kind,), seed=SEED)
    ours = native(tmp_path / "model.gguf")
    reference = quantize_reference(dequantized(tmp_path / "model.gguf", torch.float32), PLAN)
    apart = torch.stack([difference(ours, as_model(reference), text) for text in torch.randint(VOCABULARY, (20, 3))])
    # A wrong weight shows in every text; 15 of 20 with such an activation have odds below 1e-12.
    assert apart.quantile(0.25) <= 1e-4
    assert apart.max() <= 0.05


def difference(ours: Any, theirs: Any, text: Tensor) -> Tensor:
    """The relative difference of the logits after a text."""
    found, expected = (score_text(model, text.tolist()).logits[0, -1].double() for model in (ours, theirs))
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2")])
def test_law_of_texts(scheme: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    # Hundreds of rows go through all layers at once too, as a few do; so does a vocabulary of two.
    monkeypatch.setattr("mcsd.cpu.native_layers.MAX_FUSED_TOKENS", 1 << 20)
    monkeypatch.setattr("mcsd.kernels.distributions.LARGE_VOCABULARY", 2)
    paths = tmp_path / "target.gguf", tmp_path / "draft.gguf"
    for i, path in enumerate(paths):
        write_gguf(path, vocabulary=2, seed=2 * SEED + i)
    target, draft = map(native, paths)
    engine = mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=512, max_length=16)
    found = engine_law(engine, mcsd.SamplingParams(temperature=0.8, max_new_tokens=3), monkeypatch)
    check(found, target_law(as_network(target), 3, 0.8), 1e-6, 1e-6)
