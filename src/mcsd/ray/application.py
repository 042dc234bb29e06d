"""The application for Ray Serve: a front, and replicas of one engine each."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsd.config import EngineOptions
from mcsd.errors import InvalidOption, MissingPackage, check_int
from mcsd.ray.options import RayOptions
from mcsd.server.logs import log_to_stderr
from mcsd.server.options import ServerOptions

try:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from mcsd.ray.front import Front
    from mcsd.ray.replica import Replica, load_engine
except ImportError as error:
    raise MissingPackage(f"mcsd.ray needs {error.name}", 'pip install "mcsd[ray]"') from error

if TYPE_CHECKING:
    from mcsd.engine import Engine

MAX_FRONTS = 256

_HEALTH_CHECK_SECONDS = 2.0
_HEALTH_CHECKS_PER_SECOND = 100
"""One process of Ray checks all replicas: of many, each one less often."""

_DRAIN_SECONDS = 600.0
_FRONT_REQUESTS = 1024
_LOGGING = {"enable_access_log": False}
"""The front logs requests itself."""


def deployment(
    target: "str | Path | Callable[[], Engine]" = "smollm2-135m",
    draft: str | Path | None = None,
    *,
    num_replicas: int = 1,
    autoscaling_config: Mapping[str, Any] | None = None,
    num_cpus: int = 1,
    num_gpus: float = 0.0,
    num_fronts: int = 1,
    **options: Any,
) -> serve.Application:
    """An application for ``ray.serve.run``: replicas of an engine behind one address, with the routes of the server.

    Args:
        target, draft: as for `mcsd.Engine.load`. Or ``target`` is a function that loads an engine; it is called in the
            process of every replica.
        num_replicas: engines.
        autoscaling_config: of Ray Serve, in place of ``num_replicas``.
        num_cpus: threads of a replica, and cores that Ray counts for it.
        num_gpus: that Ray gives to a replica.
        num_fronts: processes that take requests and choose a replica.
        options: of `mcsd.Engine.load` and `mcsd.server.create_app`.

    Raises:
        OptionError: an unknown option, or a value outside its range.
    """
    check_int("num_fronts", num_fronts, 1, MAX_FRONTS)
    size = RayOptions(num_replicas, num_cpus, num_gpus)
    load, engine, server = _split(target, draft, options)
    scale: dict[str, Any] = {"num_replicas": max(1, size.num_replicas)}
    if autoscaling_config is not None:
        scale = {"autoscaling_config": {"target_ongoing_requests": engine.max_batch, **autoscaling_config}}
    replicas = replicas_of(load, engine, server, size, scale)
    front = serve.deployment(
        serve.ingress()(_Ingress),
        name="front",
        num_replicas=num_fronts,
        max_ongoing_requests=_FRONT_REQUESTS,
        logging_config=_LOGGING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=_HEALTH_CHECK_SECONDS,
    )
    return front.bind(replicas, server)


def replicas_of(
    load: "Callable[[], Engine]",
    engine: EngineOptions,
    server: ServerOptions,
    size: RayOptions,
    scale: Mapping[str, Any],
) -> serve.Application:
    """Replicas without a front.

    Args:
        load: loads the engine of a replica.
        engine: its options.
        server: whose key stays with the front.
        size: what each replica gets.
        scale: how many there are, in Ray's words.
    """
    most = scale["num_replicas"] if "num_replicas" in scale else scale["autoscaling_config"].get("max_replicas", 1)
    replicas = serve.deployment(
        Replica,
        name="engine",
        **scale,
        max_ongoing_requests=engine.max_batch + server.max_waiting,
        max_queued_requests=engine.max_batch + server.max_waiting,
        logging_config=_LOGGING,
        ray_actor_options={"num_cpus": size.num_cpus, "num_gpus": size.num_gpus},
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=max(_HEALTH_CHECK_SECONDS, most / _HEALTH_CHECKS_PER_SECOND),
        request_router_config=RequestRouterConfig(request_router_class="mcsd.ray.router.PrefixRouter"),
    )
    return replicas.bind(load, replace(server, api_key=None))


def _split(
    target: Any, draft: Any, options: Mapping[str, Any]
) -> "tuple[Callable[[], Engine], EngineOptions, ServerOptions]":
    known = {one.name for one in fields(EngineOptions)}
    of_engine = {name: value for name, value in options.items() if name in known}
    server = ServerOptions.of({name: value for name, value in options.items() if name not in known})
    if not callable(target):
        engine = EngineOptions(target=target, draft=draft, **of_engine)
        return partial(load_engine, engine), engine, server
    if draft is not None or of_engine:
        given = ", ".join(["draft"] * (draft is not None) + list(of_engine))
        raise InvalidOption(f"a function that loads the engine, and {given}", "give these options in the function")
    return target, EngineOptions(), server


class _Ingress:
    """A front as a deployment of Ray Serve."""

    def __init__(self, replicas: Any, options: ServerOptions) -> None:
        log_to_stderr()
        own = serve.get_replica_context().replica_id
        place = own.deployment_id
        self._front = Front(
            lambda: replicas,
            options,
            own.unique_id,
            lambda: serve.get_deployment_handle(place.name, place.app_name),
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._front.application()

    async def metrics(self) -> bytes:
        return self._front.metrics.text()
