"""``mcsd cache``: what mcsd keeps on disk, and deleting it."""

from enum import StrEnum
from typing import Annotated

import typer

from mcsd.cli.options import Json, command
from mcsd.cli.output import columns, print_json, size_text
from mcsd.errors import UnknownModel
from mcsd.loading.disk_usage import WEIGHTS, CachedFile, cached_files, delete
from mcsd.system import cache_folder


class Action(StrEnum):
    """What to do with the cache."""

    LIST = "list"
    CLEAR = "clear"


@command
def cache(
    action: Annotated[Action, typer.Argument(help="list, or clear: delete.")] = Action.LIST,
    model: Annotated[str | None, typer.Argument(help="Only what belongs to this model.", show_default="all")] = None,
    *,
    weights: Annotated[bool, typer.Option("--weights", help="Clear downloaded weights too.")] = False,
    json: Json = False,
) -> None:
    """List what mcsd keeps on disk, by model, or delete it. The environment variable MCSD_HOME moves it.

    Converted copies, profiles and kernels are made again when they are needed; weights are downloaded again.

    Examples:

    mcsd cache

    mcsd cache clear

    mcsd cache clear qwen2.5-coder-1.5b --weights
    """
    files = [file for file in cached_files() if model in (None, file.model)]
    if model is not None and not files:
        raise UnknownModel(f"the cache has nothing of {model!r:.80}", "see mcsd cache")
    if action is Action.CLEAR:
        kept = [file for file in files if file.kind == WEIGHTS and not weights]
        freed = delete(file for file in files if file not in kept)
        if json:
            print_json({"folder": str(cache_folder("")), "freed": freed})
        else:
            hint = "; --weights deletes downloaded weights too" if kept and not freed else ""
            print(f"{size_text(freed)} freed{hint}")
        return
    if json:
        entries = [{"model": one.model, "kind": one.kind, "path": str(one.path), "size": one.size} for one in files]
        print_json({"folder": str(cache_folder("")), "files": entries})
    else:
        print("\n".join(_table(files)))


def _table(files: list[CachedFile]) -> list[str]:
    total = sum(file.size for file in files)
    sizes: dict[tuple[str, str], int] = {}
    for file in files:
        key = file.model or "all models", file.kind
        sizes[key] = sizes.get(key, 0) + file.size
    rows = [("MODEL", "WHAT", "SIZE"), *((*key, size_text(size)) for key, size in sizes.items())]
    return [*columns(rows), f"{size_text(total)} in {cache_folder('')}"]
