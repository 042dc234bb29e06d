"""``mcsd serve``: an HTTP server with the API of OpenAI."""

import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsd.cli.options import command, fetch_pair, load_engine
from mcsd.config import EngineOptions, option
from mcsd.errors import InvalidOption, MissingPackage
from mcsd.ray import RayOptions
from mcsd.server import ListenOptions, ServerOptions
from mcsd.server.options import check_exposure, has_playground, is_address, read_config

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEY = "MCSD_API_KEY"
"""The environment variable of the key."""

Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with further options.", show_default="none", rich_help_panel="Server"),
]


@dataclass(frozen=True)
class ServeEngineOptions(EngineOptions):
    """As for the other commands, and the size of the batch."""

    max_batch: int = option(8, "--max-batch", help="Maximum number of texts that run together.", type=int)


@command
def serve(
    *,
    engine: ServeEngineOptions,
    server: ServerOptions,
    listen: ListenOptions,
    ray: RayOptions,
    config: Config = None,
) -> None:
    """Serve a model over HTTP with the API of OpenAI. Ctrl-C or SIGTERM ends accepted requests first.

    Examples:

    mcsd serve -m smollm2-135m

    MCSD_API_KEY=secret mcsd serve --host 0.0.0.0 --port 8080 --allowed-host llm.example.com

    mcsd serve --ray 4 --ray-cpus 8
    """
    given = read_config(config) if config is not None else {}
    server = replace(server, **{name: value for name, value in given.items() if hasattr(server, name)})
    listen = replace(listen, **{name: value for name, value in given.items() if hasattr(listen, name)})
    if server.api_key is None and os.environ.get(KEY):
        server = replace(server, api_key=os.environ[KEY])
    server = replace(server, playground=has_playground(server, listen))
    if not is_address(listen.host):
        server = replace(server, allowed_hosts=[*(server.allowed_hosts or ()), listen.host])
    check_exposure(server, listen)
    try:
        from mcsd.server.listen import serve as run

        application = _application(engine, server, ray)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"the server needs {error.name}", 'pip install "mcsd[server]"') from error
    # Commands hide the messages of libraries; those of the server are its log.
    logging.disable(logging.NOTSET)
    for library in ("transformers", "huggingface_hub", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)

    def announce(url: str) -> None:
        page = f", playground on {url}/" if server.playground else ""
        print(f"serving {engine.target} on {url}/v1{page}", file=sys.stderr, flush=True)

    try:
        with application as app:
            run(app, listen, announce)
    except OSError as error:
        raise InvalidOption(
            f"cannot listen on {listen.host}:{listen.port}: {error.strerror or error}",
            "choose another --host or --port",
        ) from error


def _application(engine: EngineOptions, server: ServerOptions, ray: RayOptions) -> "AbstractContextManager[Starlette]":
    """The server of one engine, or the front of several."""
    if ray.num_replicas:
        from mcsd.ray.local import ray_application

        fetch_pair(engine.target, engine.draft if engine.tree != "none" else engine.target)
        return ray_application(engine, server, ray)
    from mcsd.server.app import create_app

    return nullcontext(create_app(lambda: load_engine(engine), **vars(server)))
