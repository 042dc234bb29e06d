"""Models inside of others, of ``torch.compile`` and peft: the engine generates what the wrapper computes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mcsd
from mcsd import errors
from mcsd.models import TransformersModel
from support.families import tiny_family

IDS = [5, 6, 7, 8, 9, 10, 11, 12]
NEW = 12


def expected(model: Any) -> tuple[int, ...]:
    ids = torch.tensor([IDS])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )
    return tuple(output[0, len(IDS) :].tolist())


def generated(target: Any, draft: Any = "ngram", **options: Any) -> mcsd.Completion:
    return mcsd.Engine(target, draft, tree="2x2", **options).generate([IDS], temperature=0, max_new_tokens=NEW)[0]


def test_a_compiled_model_runs_as_it_was_before() -> None:
    network = tiny_family("llama")
    compiled: Any = torch.compile(network)
    done = generated(compiled, compiled)
    assert done.token_ids == expected(network)
    assert done.stats.accepted_tokens > NEW // 3
    assert TransformersModel(compiled).network is network


class Wrapper(nn.Module):
    """Stands for a ``PeftModel``: the network inside, with an adapter, and no position ids in its signature."""

    def __init__(self, network: Any, prompt_learning: bool = False) -> None:
        super().__init__()
        self.inner, self.config, self.generation_config = network, network.config, network.generation_config
        self.peft_config = {"default": Adapter(prompt_learning)}

    @property
    def device(self) -> torch.device:
        return self.inner.device  # type: ignore[no-any-return]

    def get_base_model(self) -> Any:
        return self.inner

    def generate(self, **inputs: Any) -> Any:
        return self.inner.generate(**inputs)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.inner(*inputs, **named)


class Adapter:
    peft_type = "PREFIX_TUNING"

    def __init__(self, is_prompt_learning: bool) -> None:
        self.is_prompt_learning = is_prompt_learning


class Added(nn.Module):
    """A low-rank adapter beside a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + 3 * self.low(hidden)  # type: ignore[no-any-return]


def adapted(network: Any) -> Any:
    torch.manual_seed(4)
    network = copy.deepcopy(network)
    for layer in network.model.layers:
        layer.self_attn.q_proj = Added(layer.self_attn.q_proj)
    return network


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_stays_beside_the_weights(compiled: bool) -> None:
    network = tiny_family("llama")
    wrapper: Any = Wrapper(adapted(network))
    done = generated(torch.compile(wrapper) if compiled else wrapper, network)
    assert done.token_ids == expected(wrapper) != expected(network)


def test_an_adapter_of_virtual_tokens_is_refused() -> None:
    wrapper = Wrapper(tiny_family("llama"), prompt_learning=True)
    for models in ((wrapper, "ngram"), (tiny_family("llama"), wrapper)):
        with pytest.raises(errors.UnsupportedModel, match=r"an adapter of virtual tokens \(PREFIX_TUNING\)") as info:
            mcsd.Engine(*models, tree="2x2")
        assert info.value.hint


def test_a_wrapper_that_computes_something_else_is_refused() -> None:
    class Scaled(Wrapper):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            out = super().forward(*inputs, **named)
            out.logits = out.logits.flip(-1)
            return out

    with pytest.raises(errors.UnsupportedModel, match="other logits than its paths"):
        mcsd.Engine(Scaled(tiny_family("llama")), "ngram")


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Any, Path]:
    """A real ``PeftModel``, and a folder with its adapter only."""
    peft = pytest.importorskip("peft")
    network = tiny_family("llama")
    network.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(network, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    return model, tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # Of peft.
def test_a_peft_model_and_its_folder(lora: tuple[Any, Path]) -> None:
    model, folder = lora
    wanted = expected(model)
    assert generated(model).token_ids == wanted
    with pytest.warns(errors.McsdWarning, match="the adapter stays beside the weights"):
        engine = mcsd.Engine.load(folder, "ngram", tree="2x2", dtype="float32")
    assert engine.generate([IDS], temperature=0, max_new_tokens=NEW)[0].token_ids == wanted
