"""Distributions of networks on GGUF weights as they are, against the file as the gguf package dequantizes it.

Kernels round activations to 15 bits and add in float32, so probabilities agree to 1e-3, not to 1e-12.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

import mcsd
from laws.test_exact_engine import check, engine_law, target_law
from mcsd import kernels
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.loading.load import load
from mcsd.models.compatibility import as_model
from mcsd.models.prefill import score_text
from support.chisquare import SEED
from support.gguf_files import TYPES, VOCABULARY, dequantized, write_gguf

pytestmark = pytest.mark.skipif(not kernels.has_kernels(), reason="no kernels for this CPU")

CPU = torch.device("cpu")


def native(path: Path) -> Any:
    return load(path, CPU, plan_weights(CPU, torch.float32, Role.TARGET, in_file=True)).model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", TYPES)
def test_distributions_of_every_type(
    kind: Type, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    write_gguf(tmp_path / "model.gguf", architecture, types=(kind,), seed=SEED)
    tokens = torch.randint(VOCABULARY, (60,)).tolist()
    ours = score_text(native(tmp_path / "model.gguf"), tokens).logits[0].double()
    theirs = score_text(as_model(dequantized(tmp_path / "model.gguf", torch.float64)), tokens).logits[0]
    assert ((ours - theirs).norm(dim=-1) <= 2e-3 * theirs.norm(dim=-1)).all()


@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2")])
def test_law_of_texts(scheme: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    # Hundreds of rows go through all layers at once too, as a few do; so does a vocabulary of two.
    monkeypatch.setattr("mcsd.cpu.native_layers.MAX_FUSED_TOKENS", 1 << 20)
    monkeypatch.setattr("mcsd.kernels.distributions.LARGE_VOCABULARY", 2)
    paths = tmp_path / "target.gguf", tmp_path / "draft.gguf"
    for i, path in enumerate(paths):
        write_gguf(path, vocabulary=2, seed=2 * SEED + i)
    engine = mcsd.Engine(*map(native, paths), tree=tree, scheme=scheme, max_batch=512, max_length=16)
    found = engine_law(engine, mcsd.SamplingParams(temperature=0.8, max_new_tokens=3), monkeypatch)
    check(found, target_law(dequantized(paths[0], torch.float64), 3, 0.8), 1e-3, 1e-6)
