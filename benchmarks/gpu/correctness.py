"""Checks against transformers: greedy texts, trees against paths, seeds alone and in a batch, and refusals."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import mcsd
from gpu.engines import make_engine
from gpu.session import Session
from gpu.tiny_models import FAMILIES, HIDDEN, VOCABULARY, near_copy, random_texts, tiny_model
from mcsd.errors import McsdError
from mcsd.models import BoundHead, DraftHead, TokenLayout, TransformersModel
from mcsd.models.draft_head import HeadConfig
from mcsd.models.llama import LlamaConfig
from mcsd.models.prefill import prefill

TIE = 1e-3
"""Logits that differ by less may change places in float32, where sums have another order."""

PROMPT_LENGTHS = [5, 1, 17, 40, 8, 9, 30, 3]
_NEW_TOKENS = 24
_LAYER = LlamaConfig(VOCABULARY, HIDDEN, 64, 1, 4, 2, 8, 256)
_HEADS = {
    "draft head": HeadConfig("llama", VOCABULARY, HIDDEN, (1, -1), 1, VOCABULARY),
    "EAGLE-3 head": HeadConfig("llama", VOCABULARY, HIDDEN, (0, 1, 1), 1, VOCABULARY, kind="eagle3", layer=_LAYER),
}
_TREES = ("none", "chain:4", "2x2x1", "4x2x1")
_LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_parity(session: Session) -> None:
    """Greedy texts in float32, eight in a batch, against ``model.generate``."""
    counts = session.results["parity"] = {}
    for family in FAMILIES:
        network = tiny_model(family, session.device)
        counts[family] = _compare(session, family, network, network, near_copy(network))
        if family == "llama":
            counts["n-grams"] = _compare(session, "n-grams", network, network, "ngram")
            target = TransformersModel(network)
            for kind, config in _HEADS.items():
                torch.manual_seed(1)
                counts[kind] = _compare(session, kind, network, target, BoundHead(DraftHead(config), target, "head"))
        name = f"{family}, optimize=True"
        try:
            # Fused layers take over the weights of the network that they are made of.
            optimized = make_engine(copy.deepcopy(network), near_copy(network), "2x2x1", 8, 128, optimize=True)
        except McsdError as error:
            session.results["skipped"][f"parity: {name}"] = str(error)
            session.say(f"{name} not checked: {error}")
        else:
            counts[name] = _compare(session, name, network, optimized.target, getattr(optimized.drafter, "model", None))


def _compare(session: Session, name: str, network: Any, target: Any, draft: Any) -> dict[str, int]:
    """Texts of all trees: how many are equal, how many differ at a tie, and how many differ otherwise."""
    prompts = random_texts(PROMPT_LENGTHS)
    expected = [_generate(network, prompt) for prompt in prompts]
    counts = {"equal": 0, "ties": 0, "different": 0}
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=_NEW_TOKENS)
    for tree in _TREES:
        engine = make_engine(target, draft, tree, len(prompts), 128)
        for prompt, wanted, done in zip(prompts, expected, engine.generate(prompts, params), strict=True):
            counts[_difference(network, prompt, wanted, list(done.token_ids))] += 1
    detail = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    session.check(name, not counts["different"], f"{detail}, trees {' '.join(_TREES)}")
    return counts


def _generate(network: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=network.device)
    mask = torch.ones_like(ids)
    output = network.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=_NEW_TOKENS)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def _difference(network: Any, prompt: list[int], wanted: list[int], got: list[int]) -> str:
    """Whether two texts are equal, differ first at a tie of the target's logits, or are different."""
    place = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), None)
    if place is None:
        return "equal"
    logits = network(torch.tensor([prompt + wanted[:place]], device=network.device)).logits[0, -1]
    return "ties" if float((logits[wanted[place]] - logits[got[place]]).abs()) < TIE else "different"


@torch.no_grad()
def check_trees(session: Session) -> None:
    """Logits of a whole tree against those of each of its paths alone, in a batch of three lengths."""
    shape = mcsd.TreeShape.parse("4x2x2x1")
    prompts = random_texts([5, 17, 40])
    nodes = torch.tensor(random_texts([1 + len(shape)] * len(prompts), seed=4), device=session.device)
    paths = [[0, *(1 + node for node in path if node >= 0)] for path in shape.paths.tolist()]
    for dtype, limit in _LARGEST_DIFFERENCE.items():
        network = tiny_model("llama", session.device).to(dtype)
        model = TransformersModel(network)
        cache = model.new_cache(len(prompts), 128)
        for prompt in prompts:
            prefill(model, cache, cache.add(), prompt)
        logits = model.forward(nodes, TokenLayout.tree(shape, model.device), cache).logits.float()
        largest = 0.0
        for i, prompt in enumerate(prompts):
            for column, path in enumerate(paths):
                ids = torch.tensor([prompt + nodes[i, path].tolist()], device=session.device)
                alone = network(ids).logits[0, -1].float()
                largest = max(largest, float((logits[i, column] - alone).norm() / alone.norm()))
        name = str(dtype).removeprefix("torch.")
        session.results.setdefault("tree", {})[name] = largest
        session.check(name, largest < limit, f"largest relative difference {largest:.1e}, limit {limit:.0e}")


def count_seeds(session: Session) -> None:
    """How many seeded texts are the same alone and in a batch of eight. Counted, not promised: see docs/gpu.md."""
    tiny = tiny_model("llama", session.device)
    pair = session.pair
    cases = {"tiny, float32": (tiny, near_copy(tiny)), "the pair of the timings": (pair.target, pair.draft)}
    counts = session.results["batch"] = {}
    for name, (target, draft) in cases.items():
        prompts = random_texts(PROMPT_LENGTHS, target.config.vocab_size)
        params = [mcsd.SamplingParams(seed=i, max_new_tokens=32) for i in range(len(prompts))]
        together = make_engine(target, draft, "4x2x1", len(prompts), 128).generate(prompts, params)
        alone = make_engine(target, draft, "4x2x1", 1, 128)
        same = sum(
            alone.generate(prompt, one).token_ids == done.token_ids
            for prompt, one, done in zip(prompts, params, together, strict=True)
        )
        counts[name] = {"texts": len(prompts), "equal": same}
        session.say(f"{name}: {same} of {len(prompts)} texts are the same alone and in a batch")


def check_refusals(session: Session) -> None:
    """What cannot run is refused by name: a draft on another device, and int8 weights."""
    if not session.is_cuda:
        session.results["skipped"]["refusals"] = "needs a CUDA device"
        session.say("skipped: needs a CUDA device")
        return
    network = tiny_model("llama", session.device)
    draft = near_copy(network).cpu()
    prompt = random_texts([5])[0]
    params = mcsd.SamplingParams(max_new_tokens=8)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        actions: dict[str, Callable[[], object]] = {
            "draft on the CPU": lambda: mcsd.Engine(network, draft, tree="2x1").generate(prompt, params),
            "quantize int8": lambda: mcsd.Engine.load(
                folder, "ngram", tree="2", device=str(session.device), quantize="int8"
            ).generate(prompt, params),
        }
        for name, action in actions.items():
            is_named, outcome = outcome_of(action)
            session.results.setdefault("refusals", {})[name] = outcome
            session.check(name, is_named, outcome)


def outcome_of(action: Callable[[], object]) -> tuple[bool, str]:
    """Whether an action works or is refused by a named error, and what happened."""
    try:
        action()
    except McsdError as error:
        return True, f"{type(error).__name__}: {error}"
    except Exception as error:  # Whatever torch raises in the middle of a step.
        return False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
    return True, "works"
