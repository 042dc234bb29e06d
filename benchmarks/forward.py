"""The time of one forward by the number of tokens, against the time to read the weights from memory.

    python benchmarks/forward.py --models smollm2-135m qwen2.5-coder-1.5b --nodes 1 4 11 16 --batch-sizes 1
    python benchmarks/forward.py --models qwen2.5-coder-0.5b --draft --dtype bfloat16

With the dtype auto a GGUF file keeps its weights where the kernels can read them; with another it is dequantized.
Milliseconds are medians after 200 tokens of context; the bandwidth is that of a plain sum in the same run.
"""

import argparse
import statistics
import time

import torch

from mcsd.cli.profile import bandwidth, weight_bytes
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.loading.gguf_network import keeps_weights
from mcsd.loading.load import load, resolve_dtype
from mcsd.models import LanguageModel, TokenLayout

CPU = torch.device("cpu")
_CONTEXT = 200
_REPEATS = 15


def main() -> None:
    """Print a line for each model, batch size and number of tokens a sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 11, 16, 32])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize")
    parser.add_argument("--draft", action="store_true", help="load them as drafts, which are quantized further")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    speed = bandwidth("cpu")
    print(f"memory: {speed / 1e9:.1f} GB/s")
    for name in args.models:
        start = time.perf_counter()
        role = Role.DRAFT if args.draft else Role.TARGET
        in_file = args.quantize is None and args.dtype == "auto" and keeps_weights(name)
        plan = plan_weights(CPU, resolve_dtype(args.dtype, CPU, in_file), role, args.quantize, in_file)
        model = load(name, CPU, plan, role).model
        memory_ms = 1e3 * weight_bytes(model) / speed
        print(
            f"{name}: {model.precision}, loaded in {time.perf_counter() - start:.1f} s; memory alone {memory_ms:.1f} ms"
        )
        for batch in args.batch_sizes:
            for nodes, milliseconds in forwards(model, batch, args.nodes):
                times = milliseconds / memory_ms
                print(f"  {batch} x {nodes:<3}{milliseconds:8.1f} ms{times:7.2f} times that", flush=True)


def forwards(model: LanguageModel, batch: int, nodes: list[int]) -> list[tuple[int, float]]:
    """Each number of tokens a sequence with its milliseconds; interleaved, so that drift affects all alike."""
    cache = model.new_cache(batch, _CONTEXT + max(nodes))
    for _ in range(batch):
        cache.add()
    tokens = torch.randint(0, model.vocab_size, (batch, max(_CONTEXT, *nodes)))
    model.forward(tokens[:, :_CONTEXT], TokenLayout.chain(_CONTEXT), cache, logits=False)
    cache.commit(torch.arange(_CONTEXT).expand(batch, -1), torch.full((batch,), _CONTEXT))
    seconds: dict[int, list[float]] = {count: [] for count in nodes}
    for _ in range(_REPEATS):
        for count in nodes:
            start = time.perf_counter()
            model.forward(tokens[:, :count], TokenLayout.chain(count), cache)
            seconds[count].append(time.perf_counter() - start)
    return [(count, 1e3 * statistics.median(each)) for count, each in seconds.items()]


if __name__ == "__main__":
    main()
