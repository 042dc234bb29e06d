"""``mcsd serve``: an HTTP server with the API of OpenAI."""

import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from mcsd.cli.options import command, load_engine
from mcsd.config import EngineOptions, option
from mcsd.errors import InvalidOption, MissingPackage
from mcsd.server import ListenOptions, ServerOptions
from mcsd.server.options import check_exposure, is_address, read_config

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
def serve(*, engine: ServeEngineOptions, server: ServerOptions, listen: ListenOptions, config: Config = None) -> None:
    """Serve a model over HTTP with the API of OpenAI. Ctrl-C or SIGTERM ends accepted requests first.

    Examples:

    mcsd serve -m smollm2-135m

    MCSD_API_KEY=secret mcsd serve --host 0.0.0.0 --port 8080 --allowed-host llm.example.com
    """
    given = read_config(config) if config is not None else {}
    server = replace(server, **{name: value for name, value in given.items() if hasattr(server, name)})
    listen = replace(listen, **{name: value for name, value in given.items() if hasattr(listen, name)})
    if server.api_key is None and os.environ.get(KEY):
        server = replace(server, api_key=os.environ[KEY])
    if not is_address(listen.host):
        server = replace(server, allowed_hosts=[*(server.allowed_hosts or ()), listen.host])
    check_exposure(server, listen)
    try:
        from mcsd.server.app import create_app
        from mcsd.server.listen import serve as run
    except ModuleNotFoundError as error:
        raise MissingPackage(f"the server needs {error.name}", 'pip install "mcsd[server]"') from error
    # Commands hide the messages of libraries; those of the server are its log.
    logging.disable(logging.NOTSET)
    for library in ("transformers", "huggingface_hub", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)
    app = create_app(lambda: load_engine(engine), **vars(server))
    try:
        run(app, listen, lambda url: print(f"serving {engine.target} on {url}/v1", file=sys.stderr, flush=True))
    except OSError as error:
        raise InvalidOption(
            f"cannot listen on {listen.host}:{listen.port}: {error.strerror or error}",
            "choose another --host or --port",
        ) from error
