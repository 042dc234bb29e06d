"""How long one forward takes by the tokens in flight, against the time in which memory delivers the weights.

    python benchmarks/forward.py --models smollm2-135m qwen2.5-coder-1.5b --nodes 1 4 11 16 --rows 1
    python benchmarks/forward.py --models qwen2.5-coder-0.5b --draft --compile

Milliseconds are medians behind 200 tokens of context; the bandwidth is that of a plain sum in the same run.
"""

import argparse
import statistics
import time

import torch

from mcsd.cli.profile import bandwidth
from mcsd.models import Block, TransformersModel
from mcsd.models.loading import choose_dtype, load
from speed import CPU

_CONTEXT = 200
_REPEATS = 15


def main() -> None:
    """Print a line for each model, number of rows and number of tokens a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 11, 16, 32])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize")
    parser.add_argument("--draft", action="store_true", help="load them as drafts, which are rounded further")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    speed = bandwidth("cpu")
    print(f"memory: {speed / 1e9:.1f} GB/s")
    for name in args.models:
        start = time.perf_counter()
        dtype = choose_dtype(args.dtype, CPU)
        model = load(name, CPU, dtype, args.draft, args.quantize, args.compile).model
        least = 1e3 * model.weight_bytes / speed
        print(f"{name}: loaded in {time.perf_counter() - start:.1f} s; memory alone {least:.1f} ms")
        for rows in args.rows:
            for nodes, milliseconds in forwards(model, rows, args.nodes):
                print(f"  {rows} x {nodes:<3}{milliseconds:8.1f} ms{milliseconds / least:7.2f} times that", flush=True)


def forwards(model: TransformersModel, rows: int, nodes: list[int]) -> list[tuple[int, float]]:
    """Each number of tokens a row with its milliseconds; all are timed in turn, so that a slower minute slows all."""
    cache = model.new_cache(rows, _CONTEXT + max(nodes))
    for _ in range(rows):
        cache.add()
    tokens = torch.randint(0, model.vocab_size, (rows, max(_CONTEXT, *nodes)))
    model.forward(tokens[:, :_CONTEXT], Block.chain(_CONTEXT), cache, logits=False)
    cache.commit(torch.arange(_CONTEXT).expand(rows, -1), torch.full((rows,), _CONTEXT))
    seconds: dict[int, list[float]] = {count: [] for count in nodes}
    for _ in range(_REPEATS):
        for count in nodes:
            start = time.perf_counter()
            model.forward(tokens[:, :count], Block.chain(count), cache)
            seconds[count].append(time.perf_counter() - start)
    return [(count, 1e3 * statistics.median(each)) for count, each in seconds.items()]


if __name__ == "__main__":
    main()
