"""An engine around a model that two processes share (tensor parallel): both make the text that one makes alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

SCRIPT = Path(__file__).parents[1] / "support" / "tensor_parallel.py"


@pytest.mark.slow
def test_two_ranks_make_the_texts_of_one(tmp_path: Path) -> None:
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=256, pad_token_id=0, eos_token_id=999)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    subprocess.run([*command, str(tmp_path / "model"), str(tmp_path)], check=True, timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["shard"] == [32, 64]
    assert first["difference"] < 1e-5
    assert first["look-up"] == first["alone"]
    assert first["draft"] == first["draft alone"]
