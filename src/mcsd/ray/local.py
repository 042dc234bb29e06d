"""``mcsd serve --ray``: replicas, and a front in this process that takes their requests."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mcsd.config import EngineOptions
from mcsd.errors import InvalidOption, MissingPackage
from mcsd.ray.options import RayOptions
from mcsd.server.options import ServerOptions

if TYPE_CHECKING:
    from starlette.applications import Starlette

_APPLICATION = "mcsd"
_STORE_BYTES = 256 << 20
"""Of shared memory: requests and answers are small."""


@contextmanager
def ray_application(engine: EngineOptions, server: ServerOptions, size: RayOptions) -> "Iterator[Starlette]":
    """A front for `mcsd.server.listen.serve`. Its replicas are started with it, and end with the block.

    They run on the cluster that ``RAY_ADDRESS`` names, or else on this machine alone, with a token that only this
    process and its replicas know.

    Args:
        engine: of each replica.
        server: of the front.
        size: of the replicas.

    Raises:
        MissingPackage: Ray is not installed.
        InvalidOption: this machine has too few cores.
    """
    is_own = not os.environ.get("RAY_ADDRESS")
    cores = os.cpu_count() or 1
    if is_own and size.num_replicas * size.num_cpus > cores:
        raise InvalidOption(
            f"{size.num_replicas} replicas of {size.num_cpus} cores do not fit on {cores} cores",
            "lower --ray or --ray-cpus, or name a cluster in RAY_ADDRESS",
        )
    if is_own:
        # Before Ray is imported, which reads them then.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve

        from mcsd.ray.application import replicas_of
        from mcsd.ray.front import Front
        from mcsd.ray.replica import load_engine
    except ImportError as error:
        raise MissingPackage(f"replicas need {error.name}", 'pip install "mcsd[ray]"') from error
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if is_own else {}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)

    def connect() -> Any:
        scale = {"num_replicas": size.num_replicas}
        replicas = replicas_of(partial(load_engine, engine), engine, server, size, scale)
        return serve.run(replicas, name=_APPLICATION, route_prefix=None)

    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        yield Front(connect, server).application()
    finally:
        if not is_own:
            serve.delete(_APPLICATION)
        ray.shutdown()
