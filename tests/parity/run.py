"""``make speculators``: published EAGLE-3 heads against speculators' own model, in float32.

speculators needs an older transformers than mcsd, so it runs in an environment of its own, ``--python``. Heads with
random weights are written in both formats, and one is trained by ``mcsd distill``; three chained steps must give the
same logits to 1e-5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcsd.distill import Callbacks, DistillOptions, distill
from mcsd.loading.published_heads import load_head
from mcsd.models import BoundHead, TokenLayout
from support import eagle
from support.eagle import VARIANTS, Published

TOLERANCE = 1e-5
TEXT = [5, 9, 2, 40, 9, 31, 8, 3, 17]

HEADS = [
    *(one for one in VARIANTS if one.format != "eagle" and one.size == eagle.HIDDEN),
    Published("speculators", heads=(2, 1, 32), flags={"norm_before_residual": True, "norm_output": True}),
    # What `--init` with a head of mcsd gives.
    Published(
        "speculators", heads=(4, 2, 16), flags={"norm_before_residual": True, "norm_output": True, "fc_norm": True}
    ),
    Published("speculators", "qwen3", 3, heads=(8, 8, 4), flags={"fc_norm": True}),
]
"""speculators 0.9 has no heads of another size than the target."""

TRAINED = Published("speculators", layer_ids=(2, 5, 7), flags={"norm_before_residual": True})
"""What ``mcsd distill --kind eagle3`` makes for `eagle.target_network`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=".speculators/bin/python", help="of the environment with speculators")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        target = Path(home) / "target"
        eagle.target_network().save_pretrained(target)
        heads, folders = [*HEADS, TRAINED], [Path(home) / str(index) for index in range(len(HEADS) + 1)]
        for head, folder in zip(HEADS, folders, strict=False):
            write(head, folder)
        options = DistillOptions(str(target), folders[-1], "eagle3", steps=30, tokens=3000, vocab=40, batch=16)
        distill(options, Callbacks(lambda tokens: None, lambda report: None))
        for head, folder in zip(heads, folders, strict=True):
            write_inputs(head, folder)
        command = [args.python, str(Path(__file__).parent / "reference.py"), *map(str, folders)]
        subprocess.run(command, check=True)
        errors = [error(head, folder) for head, folder in zip(heads, folders, strict=True)]
    for head, found in zip(heads, errors, strict=True):
        print(f"{found:.1e}  {head}{' (trained)' if head is TRAINED else ''}")
    print(f"{len(heads)} heads, largest difference {max(errors):.1e}")
    sys.exit(max(errors) > TOLERANCE)


def write(head: Published, folder: Path) -> None:
    """Write a head that names its target."""
    head.write(folder)
    fields = json.loads((folder / "config.json").read_text())
    if "speculators_config" in fields:
        fields["speculators_config"]["verifier"]["name_or_path"] = str(folder.parent / "target")
        (folder / "config.json").write_text(json.dumps(fields))


def write_inputs(head: Published, folder: Path) -> None:
    """Write the inputs of three steps."""
    embeddings = eagle.target_network().get_input_embeddings().weight.detach()
    inputs = {"states": eagle.states(head, TEXT[:-1])[None], "tokens": torch.tensor([TEXT[1:]])}
    save_file(
        {name: tensor.contiguous() for name, tensor in inputs.items()} | {"embeddings": embeddings.clone()},
        folder / "inputs.safetensors",
    )


def error(head: Published, folder: Path) -> float:
    """The largest difference, relative to numbers of 1 and more, of the logits of all steps."""
    expected, bound = (
        load_file(folder / "logits.safetensors")["logits"],
        BoundHead(load_head(folder, eagle.target()), eagle.target(), "head"),
    )
    differences = []
    for root in range(1, len(TEXT) - 2):
        for step, found in enumerate(steps(bound, head, root)):
            wanted = expected[step, root - 1]
            differences.append(((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item())
    return max(differences)


def steps(bound: BoundHead, head: Published, root: int) -> list[Tensor]:
    """Logits after the text up to a root, and after the next two tokens, which the target has not read."""
    states = eagle.states(head, TEXT[:root])
    before = torch.cat([torch.zeros_like(states[:1]), states])
    cache = bound.new_cache(1, len(TEXT) + 1)
    cache.add()
    output = bound.forward(torch.tensor([TEXT[: root + 1]]), before[None], TokenLayout.chain(root + 1), cache)
    cache.commit(torch.arange(root + 1)[None], torch.tensor([root + 1]))
    found = [output.logits[0, -1]]
    for step, token in enumerate(TEXT[root + 1 : root + 3]):
        assert output.hidden is not None
        layout = TokenLayout(torch.arange(step + 1), torch.ones(1, step + 1, dtype=torch.bool))
        output = bound.forward(torch.tensor([[token]]), output.hidden[:, -1:], layout, cache, own=True)
        found.append(output.logits[0, -1])
    return found


if __name__ == "__main__":
    main()
