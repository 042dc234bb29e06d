"""Acceptance against the number of candidates, for every scheme and for the best that independent draws allow.

The schemes' own draws and judgements run on pairs of distributions: random ones, and those of recorded positions of a
real pair. Positions are recorded on text that the target wrote at temperature 1, one forward of each model over it:

    python benchmarks/theory.py --record smollm2-135m smollm2-135m-head --prompts FILE.jsonl ... --to PAIR.safetensors

Then measured, printed and drawn; without --pairs, the figures of last time are drawn again:

    python benchmarks/theory.py --pairs PAIR.safetensors ...

Left out: traversal and block, which at one node are mcss-wor and, for one candidate, ordinary rejection. Standard
errors are of the schemes' own randomness, the positions being what they are. Drawing needs `pip install mcsd[bench]`.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import mcsd
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.drafters.level import SUPPORT
from mcsd.loading.load import LoadedModel, load, load_draft, resolve_dtype
from mcsd.loading.published_heads import is_head
from mcsd.models import TokenLayout
from mcsd.models.bound_head import BoundHead
from mcsd.models.prefill import score_text
from mcsd.models.protocol import DecoderModel
from mcsd.prompts import evenly_spaced, load_prompts
from mcsd.rng import DRAW, VERIFY, PhiloxStream
from mcsd.sampling import BatchSamplingParams, SparseDistributions, probabilities, sparse_probabilities
from mcsd.schemes import SCHEMES, CandidateTree, TokenHistory
from mcsd.schemes.optimum import iid_optimum
from mcsd.schemes.registry import REGISTRY
from mcsd.schemes.residual import on_support

CPU = torch.device("cpu")
DOCS = Path(__file__).parent.parent / "docs"
WIDTHS = (1, 2, 3, 4, 8)
NAMES = tuple(name for name in SCHEMES if name not in ("traversal", "block"))
OPTIMUM = "optimum (iid)"
RANDOM = ((0.1, None), (1.0, None), (0.1, 10.0))
"""Concentration and likeness, see `dirichlet`."""
TEMPERATURE_1 = mcsd.SamplingParams(temperature=1.0)


@dataclass(frozen=True)
class Pairs:
    """Distributions of N positions.

    Attributes:
        name: for people.
        q: ``[N, S]``, the draft's.
        p: ``[N, S + 1]``, the target's on the support of q, and last its mass outside.
    """

    name: str
    q: Tensor
    p: Tensor


def main() -> None:
    """Record, or measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs=2, metavar=("TARGET", "DRAFT"))
    parser.add_argument("--prompts", type=Path, nargs="+", default=[])
    parser.add_argument("--each", type=int, default=24, help="prompts of each file, evenly spaced")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--to", type=Path, default=Path("pair.safetensors"))
    parser.add_argument("--pairs", type=Path, nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=32, help="times that each position is drafted and judged")
    parser.add_argument("--json", type=Path, default=DOCS / "acceptance.json")
    parser.add_argument("--svg", type=Path, default=DOCS / "acceptance.svg")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.record:
        record(args)
        return
    if args.pairs:
        rows = []
        for pairs in [*(dirichlet(*kind) for kind in RANDOM), *map(recorded, args.pairs)]:
            rows.append(measure(pairs, args.repeats))
            print(table(rows[-1]), flush=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    draw(json.loads(args.json.read_text()), args.svg)


# ---- recording


@dataclass(frozen=True)
class Answer:
    """All tokens but the last; the target's logits ``[n, V]`` where it wrote; its states ``[1, all, F]`` everywhere."""

    tokens: list[int]
    logits: Tensor
    states: Tensor | None


def record(args: argparse.Namespace) -> None:
    """Write q and p of positions of the target's answers to a file."""
    name, draft = args.record
    dtype = resolve_dtype(args.dtype, CPU)
    target = load(name, CPU, plan_weights(CPU, dtype, Role.TARGET))
    model: DecoderModel | BoundHead
    if is_head(draft):
        head: BoundHead = load_draft(draft, target)
        model = head
        answers = list(written(target, args, head.config.hidden_layers))
    else:
        answers = list(written(target, args, ()))
        # One model in memory at a time: the target leaves before the draft comes.
        del target
        model = load(draft, CPU, plan_weights(CPU, dtype, Role.DRAFT), Role.DRAFT).model
    found = [compared(answer, model) for answer in answers]
    q, p = (torch.cat(parts) for parts in zip(*found, strict=True))
    chosen = torch.linspace(0, len(q) - 1, min(args.positions, len(q))).long()
    note = {"target": name, "draft": Path(draft).name, "prompts": " ".join(path.stem for path in args.prompts)}
    save_file({"q": q[chosen].contiguous(), "p": p[chosen].contiguous()}, args.to, metadata=note)
    print(f"{len(chosen)} of {len(q)} positions in {args.to}")


def written(target: LoadedModel, args: argparse.Namespace, layers: tuple[int, ...]) -> Iterator[Answer]:
    """The target answers the prompts, and reads what it wrote."""
    engine = mcsd.Engine(target.model, tokenizer=target.tokenizer, tree="none", max_batch=8, max_length=1024)
    texts = [text for path in args.prompts for text in evenly_spaced(load_prompts(path), args.each)]
    prompts = [engine.chat_tokens([{"role": "user", "content": text}]) for text in texts]
    params = mcsd.SamplingParams(temperature=1.0, max_new_tokens=args.new, seed=1)
    for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
        tokens = [*prompt, *done.token_ids][:-1]
        output = score_text(target.model, tokens, layers)
        yield Answer(tokens, output.logits[0, len(prompt) - 1 :].clone(), output.hidden)


def compared(answer: Answer, draft: DecoderModel | BoundHead) -> tuple[Tensor, Tensor]:
    """q ``[n, S]`` and p ``[n, S + 1]`` where the target wrote."""
    if isinstance(draft, BoundHead):
        assert answer.states is not None
        # A head reads each token with the target's states one place before, of which the first has none.
        states = torch.nn.functional.pad(answer.states, (0, 0, 1, 0))[:, :-1]
        cache = draft.new_cache(1, len(answer.tokens))
        cache.add()
        block = TokenLayout.chain(len(answer.tokens))
        output = draft.forward(torch.tensor([answer.tokens]), states, block, cache)
    else:
        output = score_text(draft, answer.tokens)
    count, size = answer.logits.shape
    settings = BatchSamplingParams.of([TEMPERATURE_1] * count, CPU)
    q = sparse_probabilities(output.logits[0, -count:, :size], settings, SUPPORT)
    support = q.support if draft.vocabulary is None else draft.vocabulary[q.support]
    p, _ = on_support(probabilities(answer.logits, settings), support)
    return q.weights, p


# ---- measuring


def dirichlet(concentration: float, likeness: float | None = None, count: int = 500, size: int = 64) -> Pairs:
    """Random pairs. The smaller the concentration, the fewer tokens share the mass.

    Args:
        concentration: of p and q, which are independent, or of m, around which both lie.
        likeness: p and q are Dirichlet with parameters ``likeness * m``; None: there is no m.
        count: of positions.
        size: of the vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    shape = torch.full((2, count, size), concentration, dtype=torch.float64)
    if likeness is None:
        name = f"independent Dirichlet({concentration:g})"
    else:
        name = f"Dirichlet({likeness:g} m), m Dirichlet({concentration:g})"
        shape = likeness * _sampled(shape[0], generator).expand(2, -1, -1)
    p, q = _sampled(shape, generator)
    return Pairs(f"{name}, {size} tokens", q, torch.nn.functional.pad(p, (0, 1)))


def _sampled(shape: Tensor, generator: torch.Generator) -> Tensor:
    """Dirichlet: normalised gamma variables, by their logarithms because small shapes underflow."""
    gamma = torch._standard_gamma(shape + 1, generator=generator)
    uniform = torch.rand(shape.shape, generator=generator, dtype=shape.dtype)
    return (gamma.log() + uniform.log() / shape).softmax(-1)


def recorded(path: Path) -> Pairs:
    """Positions of a real pair."""
    with safe_open(path, "pt") as file:
        note = file.metadata()
        q, p = (file.get_tensor(name).double() for name in ("q", "p"))
    return Pairs(f"{note['target']} ← {note['draft']}", q, p)


def measure(pairs: Pairs, repeats: int) -> dict[str, Any]:
    """Acceptances and standard errors by scheme and number of candidates."""
    acceptance: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    error: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    for name in NAMES:
        for k in WIDTHS:
            if k <= (REGISTRY[name].max_width or k):
                by_repeat = torch.tensor([share_accepted(pairs, name, k, repeat) for repeat in range(repeats)])
                acceptance[name][k] = round(by_repeat.mean().item(), 5)
                error[name][k] = round(by_repeat.std().item() / repeats**0.5, 5)
    acceptance[OPTIMUM] = {k: round(iid_optimum(pairs.p, pairs.q, k).mean().item(), 5) for k in WIDTHS}
    return {"pair": pairs.name, "positions": len(pairs.q), "acceptance": acceptance, "standard_error": error}


def share_accepted(pairs: Pairs, scheme: str, k: int, repeat: int) -> float:
    """Share of the positions at which one of k candidates is accepted: the scheme as the engine runs it."""
    count, size = pairs.q.shape
    judge, shape = SCHEMES[scheme](), mcsd.TreeShape.parse(str(k))
    settings = BatchSamplingParams.of([TEMPERATURE_1] * count, CPU)
    seeds, place = torch.arange(count), torch.full((count,), repeat)
    drawn = judge.draw(pairs.q[:, None], [k], settings, PhiloxStream(seeds, place, DRAW))[:, 0]
    choice = drawn.clamp(min=0)
    weights = torch.nn.functional.pad(pairs.q[:, None], (0, 0, 0, k))
    q = SparseDistributions(torch.arange(size).expand_as(weights), weights)
    tree = CandidateTree(shape, choice, drawn >= 0, choice, q, torch.zeros(count, dtype=torch.bool))
    # To the scheme this is a vocabulary of S + 1 tokens, the last of which is all that is outside.
    logits = pairs.p.log()[:, None].expand(-1, 1 + k, -1)
    texts = TokenHistory([[]] * count, [[]] * count)
    verdict = judge.verify(tree, logits, settings, texts, PhiloxStream(seeds, place, VERIFY))
    assert not verdict.failed.any()
    return verdict.accepted.double().mean().item()


def table(row: dict[str, Any]) -> str:
    """Scheme by number of candidates, for people."""
    lines = [f"\n{row['pair']}: {row['positions']} positions", f"{'k':<16}" + "".join(f"{k:>17}" for k in WIDTHS)]
    for name, by_k in row["acceptance"].items():
        errors = row["standard_error"].get(name)
        cells = (f"{by_k[k]:.4f}" + (f" ± {errors[k]:.4f}" if errors else " " * 9) for k in WIDTHS if k in by_k)
        lines.append(f"{name:<16}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


# ---- drawing

STYLES: dict[str, dict[str, Any]] = {
    OPTIMUM: {"color": "black", "linestyle": "--", "zorder": 3},
    "mcss-wor": {"color": "#0072B2", "marker": "o"},
    "mcss": {"color": "#56B4E9", "marker": "s"},
    "greedy-draft": {"color": "#D55E00", "marker": "D"},
    "k-seq": {"color": "#CC79A7", "marker": "v"},
    "spechub": {"color": "#B59F00", "marker": "o", "markersize": 10, "markerfacecolor": "none"},
    "top-k": {"color": "#009E73", "marker": "^"},
    "naive": {"color": "#7F7F7F", "marker": "P"},
}
"""Colours of Okabe and Ito, told apart by the colour-blind; markers for print in grey. spechub lies on greedy-draft."""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a pair, and the legend in a place of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = (len(rows) + 2) // 2
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 7.2), layout="constrained")
    panels = axes.flatten()
    for axis, row in zip(panels, rows, strict=False):
        for name, style in STYLES.items():
            by_k = row["acceptance"][name]
            axis.plot(
                [int(k) for k in by_k], list(by_k.values()), label=name, **{"markersize": 5, "linewidth": 1.3, **style}
            )
        axis.set_title(row["pair"], fontsize=10)
        axis.set(xscale="log", xlabel="candidates k", ylabel="P(one of k is accepted)")
        axis.set_xticks(WIDTHS, [str(k) for k in WIDTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in panels[len(rows) :]:
        axis.axis("off")
    panels[len(rows)].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=11)
    # No date, no random ids: the same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "mcsd"
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
