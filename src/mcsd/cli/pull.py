"""``mcsd pull``: download the weights of a model."""

from typing import Annotated

import typer

from mcsd.cli.options import Json, command
from mcsd.cli.output import fetch, print_json


@command
def pull(
    name: Annotated[str, typer.Argument(help="A model name from mcsd models.")],
    json: Json = False,
) -> None:
    """Download the weights of a model if they are missing, and print their path."""
    path = fetch(name)
    if json:
        print_json({"name": name, "path": str(path), "size": path.stat().st_size})
    else:
        print(path)
