"""``mcsd pull``: fetch the weights of a model."""

from typing import Annotated

import typer

from mcsd.cli.options import Json, command
from mcsd.cli.output import fetch, print_json


@command
def pull(
    name: Annotated[str, typer.Argument(help="A name that mcsd models lists.")],
    json: Json = False,
) -> None:
    """Fetch the weights of a model, unless they are on disk, and print where they are."""
    path = fetch(name)
    if json:
        print_json({"name": name, "path": str(path), "size": path.stat().st_size})
    else:
        print(path)
