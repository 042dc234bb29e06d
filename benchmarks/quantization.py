"""The effect of bfloat16 and int8 on a target's distributions, against float32, position by position.

The float32 target answers prompts at temperature 1; each format of it then scores the answers. Printed, over all
positions of the answers: the total variation distance (mean and largest), the mean KL divergence, and how often the
most probable token is the same.

    python benchmarks/quantization.py --target smollm2-135m --prompts alpaca.jsonl humaneval.jsonl --each 8
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mcsd
from mcsd.cpu.reference import round_activations
from mcsd.cpu.weight_plan import Role, WeightPlan, plan_weights
from mcsd.loading.load import load, read_transformers
from mcsd.models.prefill import score_text
from mcsd.models.transformers import TransformersModel
from mcsd.prompts import evenly_spaced, load_prompts

CPU = torch.device("cpu")
FORMATS = {
    "GGUF as it is": (torch.float32, None, True),
    "bfloat16": (torch.bfloat16, None, False),
    "bfloat16, int8": (torch.bfloat16, "int8", False),
    "float32, int8": (torch.float32, "int8", False),
}
"""dtype, ``quantize``, and whether the weights stay as they are in the file."""

INT8_ACTIVATIONS = {"int8 activations per 256": 256}
"""What it would be with activations in int8 and a scale for so many inputs, as ggml's Q8_K has."""

_INT8_STEPS = 127


class Text(NamedTuple):
    """An answer: all tokens, where it begins, and the float32 log-probabilities ``[n, V]`` of its positions."""

    tokens: list[int]
    prompt: int
    logprobs: Tensor


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=8, help="prompts of each file, evenly spaced")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, *INT8_ACTIVATIONS], default=list(FORMATS))
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    loaded = load(args.target, CPU, WeightPlan(torch.float32))
    engine = mcsd.Engine(loaded.model, tokenizer=loaded.tokenizer, tree="none", max_length=1024)
    asked = [text for path in args.prompts for text in evenly_spaced(load_prompts(path), args.each)]
    prompts = [engine.chat_tokens([{"role": "user", "content": text}]) for text in asked]
    params = mcsd.SamplingParams(temperature=1, max_new_tokens=args.new, seed=1)
    texts = []
    for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
        tokens = [*prompt, *done.token_ids]
        texts.append(Text(tokens, len(prompt), logprobs(engine.target, tokens, len(prompt))))
    del engine, loaded
    target: mcsd.models.LanguageModel
    for name in args.formats:
        if name in FORMATS:
            dtype, quantize, in_file = FORMATS[name]
            target = load(args.target, CPU, plan_weights(CPU, dtype, Role.TARGET, quantize, in_file)).model
        else:
            target = with_int8_activations(args.target, INT8_ACTIVATIONS[name])
        pairs = [(text.logprobs, logprobs(target, text.tokens, text.prompt)) for text in texts]
        tv = torch.cat([(p.exp() - q.exp()).abs().sum(-1) / 2 for p, q in pairs])
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).float()
        print(
            f"{args.target}  {name:<15} {len(tv)} positions  TV {tv.mean():.4f} (largest {tv.max():.3f})  "
            f"KL {kl.mean():.5f}  same argmax {same.mean():.1%}",
            flush=True,
        )


def with_int8_activations(name: str, group: int) -> mcsd.models.LanguageModel:
    """The float32 network whose linear layers read rounded activations."""

    def rounded(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return round_activations(inputs[0], _INT8_STEPS, group)

    network, _ = read_transformers(name, torch.float32)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounded)
    return TransformersModel(network.eval())


def logprobs(model: mcsd.models.LanguageModel, tokens: list[int], prompt: int) -> Tensor:
    """Log-probabilities ``[n, V]`` at the positions of the answer."""
    logits = score_text(model, tokens).logits[0, prompt - 1 : -1]
    return logits.float().log_softmax(-1)


if __name__ == "__main__":
    main()
