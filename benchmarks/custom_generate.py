"""Speed of ``custom_generate`` against ``model.generate``, interleaved, and its cost over the engine, on objects.

    python benchmarks/custom_generate.py --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b

Prints tokens per second at temperature 0 and 1, their ratio, and the time of a call outside the engine. Nothing is
packed unless ``--optimize`` is given.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import mcsd
import mcsd.hf
from mcsd.loading.load import read_transformers
from mcsd.prompts import default_prompts


def main() -> None:
    """Time a pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimize", action="store_true")
    args = parser.parse_args()
    model, tokenizer = read_transformers(args.target, torch.bfloat16)
    model.eval()
    draft = args.draft if args.draft == "ngram" else read_transformers(args.draft, torch.bfloat16)[0].eval()
    speculator = mcsd.hf.speculative(draft, tree=args.tree, tokenizer=tokenizer, optimize=args.optimize)
    # Plain text: nothing of the model's own generation config.
    model.generation_config = type(model.generation_config)(pad_token_id=0)

    def arguments(temperature: float) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        return {"max_new_tokens": args.tokens, **sampling}

    def generate(prompt: list[int], temperature: float, method: Any = None) -> int:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=method, **arguments(temperature))
        return int(out.shape[1]) - len(prompt)

    generate([1, 2, 3], 0.0, speculator)
    assert speculator.engine is not None
    prompts = default_prompts(speculator.engine.encoder)[: args.prompts]
    in_engine = SecondsOf(speculator.engine, "generate")
    ways: dict[str, Callable[[list[int], float], int]] = {
        "generate": generate,
        "custom_generate": lambda prompt, temperature: generate(prompt, temperature, speculator),
    }
    for temperature in (0.0, 1.0):
        report(temperature, ways, prompts, args.rounds, in_engine)


class SecondsOf:
    """Adds up the time of a method of an object.

    Args:
        owner: the object.
        name: of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds = 0.0
        self._method = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        start = time.perf_counter()
        try:
            return self._method(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def report(
    temperature: float,
    ways: dict[str, Callable[[list[int], float], int]],
    prompts: Sequence[list[int]],
    rounds: int,
    in_engine: SecondsOf,
) -> None:
    """Time all ways in turn, and print the median over the rounds."""
    overheads: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name, way in ways.items():
            inside, start = in_engine.seconds, time.perf_counter()
            tokens = sum(way(prompt, temperature) for prompt in prompts)
            seconds, inside = time.perf_counter() - start, in_engine.seconds - inside
            if number:  # The first round warms up.
                rates[name].append(tokens / seconds)
                if inside:
                    overheads.append(seconds / inside - 1)
    speed = {name: statistics.median(each) for name, each in rates.items()}
    print(f"temperature {temperature}:", ", ".join(f"{name} {rate:.2f} tokens/s" for name, rate in speed.items()))
    print(f"  custom_generate: {speed['custom_generate'] / speed['generate']:.2f} times generate,", end=" ")
    print(f"{statistics.median(overheads):.2%} on top of the engine's own time")


if __name__ == "__main__":
    main()
