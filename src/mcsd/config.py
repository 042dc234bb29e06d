"""The options of loading and of the engine, declared once for Python and the command line. Imports no torch.

Everything that can be checked without reading a model is checked when an object is made.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcsd.errors import InvalidOption, UnknownScheme, check_int
from mcsd.schemes.registry import REGISTRY, check_tree
from mcsd.tree import TreeShape

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)
MAX_BATCH = 4096
MAX_LENGTH = 1 << 20
MAX_CACHE_TOKENS = 1 << 24
"""Bound of ``max_batch * max_length``, the size to which the key-value cache may grow."""
SAMPLING_DEFAULTS = ("model", "mcsd")

Tree = str | Path | Sequence[int] | TreeShape

_DEVICE = re.compile(r"[a-z]+(:[0-9]{1,3})?")


def option(
    default: Any, *flags: str, help: str, type: Any = str, shown: str | bool = True, panel: str = "Engine"
) -> Any:
    """A field of an options class that the command line offers as an option.

    Args:
        default: its value if the user gives none.
        flags: such as ``--target`` and ``-m``.
        help: one line.
        type: of its value on the command line.
        shown: how the help shows the default; True: the default itself.
        panel: of the help.
    """
    metadata = {"flags": flags, "help": help, "type": type, "shown": shown, "panel": panel}
    return field(default=default, metadata=metadata)


def same_option(options: Any, name: str) -> Any:
    """A field with the default, flags and help of another options class."""
    original = options.__dataclass_fields__[name]
    return field(default=original.default, metadata=original.metadata)


@dataclass(frozen=True)
class LoadOptions:
    """Which models are loaded, and how.

    Raises:
        InvalidOption: an unknown device, dtype or quantization.
    """

    target: str | Path = option(
        "smollm2-135m", "--target", "-m", help="Target model: a name (see mcsd models), folder, GGUF file or hub id."
    )
    draft: str | Path | None = option(
        None,
        *("--draft", "-md"),
        help="Draft model, named like the target; ngram or ngram:FILE; or both, as NAME+ngram.",
        type=str | None,
        shown="the target's default draft, else ngram",
    )
    device: str = option("auto", "--device", help="auto, cpu, cuda or cuda:N.")
    dtype: str = option("auto", "--dtype", help="auto, float32, bfloat16 or float16.")
    quantize: str | None = option(None, "--quantize", help="Quantize the weights: int8.", type=str | None, shown="off")
    compile: bool = option(False, "--compile", help="Compile the models; no effect yet.", type=bool)

    def __post_init__(self) -> None:
        for role, model, kinds in (("target", self.target, str | Path), ("draft", self.draft, str | Path | None)):
            if not isinstance(model, kinds):
                raise InvalidOption(
                    f"{role} is a {type(model).__name__}, not a name or path",
                    "for models as objects use mcsd.Engine(target=model, draft=draft, tokenizer=tokenizer)",
                )
        if not _DEVICE.fullmatch(str(self.device)):
            raise InvalidOption(f"device {self.device!r:.40} is not one", "auto, cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise InvalidOption(f"dtype {self.dtype!r:.40} is unknown", f"one of {', '.join(DTYPES)}")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise InvalidOption(
                f"quantize {self.quantize!r:.40} is unknown", f"one of {', '.join(QUANTIZATIONS)}, or leave it out"
            )


@dataclass(frozen=True)
class EngineOptions(LoadOptions):
    """The arguments of `mcsd.Engine.load`.

    Raises:
        InvalidOption, InvalidTree, UnknownScheme: by name.
    """

    tree: Tree = option("auto", "--tree", help="Tree of candidates: 4x2x2x1, chain:4, none, auto or a JSON file.")
    scheme: str = option("mcss-wor", "--scheme", help=f"Draws and verifies the candidates: {', '.join(REGISTRY)}.")
    max_batch: int = 8
    max_length: int | None = option(
        None,
        "--max-length",
        help="Maximum number of tokens, prompt included.",
        type=int | None,
        shown="the model's context",
    )
    sampling_defaults: str = option(
        "model",
        "--sampling-defaults",
        help="Sampling options that are not given: those of the model (its generation config), or of mcsd.",
        panel="Sampling",
    )

    prefix_cache: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_tree(self.scheme, self.tree)
        check_sizes(self.max_batch, self.max_length)
        check_int("prefix_cache", self.prefix_cache, 0, MAX_BATCH)
        check_sampling_defaults(self.sampling_defaults)


def split_draft(draft: Any, scheme: str | None = None) -> tuple[Any, str | None]:
    """The model and the look-up of a draft; None for the one that it does not name.

    Args:
        draft: a model as object or name; "ngram", or "ngram:PATH" to look up in a file or folder too; both, as
            ``[model, "ngram"]`` or "name+ngram".
        scheme: that verifies, if it is known.

    Raises:
        InvalidOption: a list that is not both, or a scheme that cannot verify both.
    """
    model, look_up = draft, None
    if isinstance(draft, list | tuple):
        if len(draft) != 2 or not _is_look_up(draft[1]) or _is_look_up(draft[0]):
            raise InvalidOption(f"draft={draft!r:.80} is not a model and 'ngram'", "give [model, 'ngram']")
        model, look_up = draft
    elif _is_look_up(draft):
        model, look_up = None, draft
    elif isinstance(draft, str):
        name = draft.partition("+ngram")[0]
        if name and _is_look_up(draft[len(name) + 1 :]):
            model, look_up = name, draft[len(name) + 1 :]
    if look_up and model is not None and scheme and REGISTRY[scheme].tree_level:
        raise InvalidOption(
            f"scheme {scheme} verifies whole trees and takes no n-grams beside a draft",
            "use scheme mcss-wor, or one draft",
        )
    return model, look_up


def _is_look_up(draft: Any) -> bool:
    return isinstance(draft, str) and (draft == "ngram" or draft.startswith("ngram:"))


def parse_tree(scheme: str, tree: Tree) -> TreeShape | None:
    """The shape of a tree; None for "auto".

    Raises:
        UnknownScheme, InvalidTree: an unknown scheme; not a tree, or one that the scheme cannot verify.
    """
    if not isinstance(scheme, str) or scheme not in REGISTRY:
        raise UnknownScheme(f"scheme {scheme!r:.40} is unknown", f"one of {', '.join(REGISTRY)}")
    if isinstance(tree, str) and tree == "auto":
        return None
    shape = TreeShape.parse(tree)
    check_tree(scheme, shape)
    return shape


def check_sampling_defaults(name: str) -> None:
    """Check that a name is in `SAMPLING_DEFAULTS`.

    Raises:
        InvalidOption: it is not.
    """
    if name not in SAMPLING_DEFAULTS:
        raise InvalidOption(f"sampling_defaults {name!r:.40} is unknown", f"one of {', '.join(SAMPLING_DEFAULTS)}")


def check_sizes(max_batch: int, max_length: int | None) -> None:
    """Check the size of the key-value cache; without ``max_length`` it is the model's context.

    Raises:
        InvalidOption: a size outside its range.
    """
    check_int("max_batch", max_batch, 1, MAX_BATCH)
    if max_length is None:
        return
    check_int("max_length", max_length, 1, MAX_LENGTH)
    if max_batch * max_length > MAX_CACHE_TOKENS:
        raise InvalidOption(
            f"max_batch={max_batch} sequences of max_length={max_length} are more than {MAX_CACHE_TOKENS} tokens",
            "lower one",
        )
