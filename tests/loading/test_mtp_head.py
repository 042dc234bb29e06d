"""The multi-token-prediction layer of a target as its draft: it computes what transformers' own module does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import mcsd
from mcsd.errors import UnknownModel, UnsupportedModel, WeightsCorrupt
from mcsd.loading.load import LoadedModel, load_draft, load_pair
from mcsd.models import BoundHead, TokenLayout, TransformersModel
from support import eagle

_SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
_SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
_SIZES |= {"num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_SIZES |= {"max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None}
_LATENT = {"kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8}

CONFIGS = {
    "deepseek3": lambda: DeepseekV3Config(**_SIZES, **_LATENT),
    "glm4-moe": lambda: Glm4MoeConfig(**_SIZES, head_dim=16),
}


@pytest.fixture(params=sorted(CONFIGS))
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[TransformersModel, Any, BoundHead]:
    """A random target, its layer as transformers has it, and as a draft. Weights are not read from a file."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]()
    config.num_mtp_layers = 1
    network = AutoModelForCausalLM.from_config(config).eval()
    mtp = MtpModel(network, 1).eval()
    for parameter in (*network.parameters(), *mtp.layers.parameters()):
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    monkeypatch.setattr(MtpModel, "from_pretrained", lambda main, device_map: mtp)
    target = TransformersModel(network)
    return target, mtp, load_draft("mtp", LoadedModel(target, None))


@torch.no_grad()
def test_a_chain_of_three_steps_computes_what_transformers_does(pair: tuple[TransformersModel, Any, BoundHead]) -> None:
    target, mtp, head = pair
    text, read = [5, 9, 2, 40, 9, 31, 8, 3], 5
    states = target.network(torch.tensor([text[:read]]), output_hidden_states=True).hidden_states[-1]
    cache, mtp_cache = head.new_cache(1, 16), MtpCache(config=mtp.config)
    cache.add()
    before = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    output = head.forward(torch.tensor([text[: read + 1]]), before, TokenLayout.chain(read + 1), cache)
    cache.commit(torch.arange(read + 1)[None], torch.tensor([read + 1]))
    positions = torch.arange(1, read + 1)[None]
    hidden: Tensor = mtp.forward_layer(0, states, positions, mtp_cache, input_ids=torch.tensor([text[1 : read + 1]]))
    torch.testing.assert_close(output.logits[:, 1:], mtp._project_to_logits(hidden), atol=1e-5, rtol=1e-5)
    for step, token in enumerate(text[read + 1 :]):
        assert output.hidden is not None
        layout = TokenLayout(torch.arange(step + 1), torch.ones(1, step + 1, dtype=torch.bool))
        tokens = torch.tensor([[token]])
        output = head.forward(tokens, output.hidden[:, -1:], layout, cache, own=True)
        place = torch.tensor([[read + 1 + step]])
        hidden = mtp.forward_layer(0, hidden[:, -1:], place, mtp_cache, input_ids=tokens)
        torch.testing.assert_close(output.logits, mtp._project_to_logits(hidden), atol=1e-5, rtol=1e-5)


def test_it_drafts_in_trees_and_batches(pair: tuple[TransformersModel, Any, BoundHead]) -> None:
    """The text at temperature 0 is that of plain decoding."""
    target, _, head = pair
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=12)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    plain = mcsd.Engine(target, tree="none", max_batch=2, max_length=64).generate(prompts, params)
    drafted = mcsd.Engine(target, head, tree="2x2x1", max_batch=2, max_length=64).generate(prompts, params)
    assert [done.token_ids for done in drafted] == [done.token_ids for done in plain]


def test_targets_without_such_a_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModel, match="no multi-token-prediction layers"):
        load_draft("mtp", LoadedModel(eagle.target(), None))
    network = DeepseekV3ForCausalLM(CONFIGS["deepseek3"]())
    with pytest.raises(WeightsCorrupt, match="mtp"):
        load_draft("mtp", LoadedModel(TransformersModel(network), None))
    network.config.num_mtp_layers = 2
    with pytest.raises(UnsupportedModel, match="one for each position ahead"):
        load_draft("mtp", LoadedModel(TransformersModel(network), None))
    with pytest.raises(UnknownModel, match="is a draft"):
        load_pair(mcsd.config.LoadOptions(target="mtp", draft="ngram"))
