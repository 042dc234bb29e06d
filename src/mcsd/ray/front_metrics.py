"""The metrics of a front, and those of many processes as one text for Prometheus."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class FrontMetrics:
    """Counts what the front does; what engines do is counted by their replicas.

    Args:
        replicas: returns how many run.
        name: of the front, where there may be several.
    """

    def __init__(self, replicas: Callable[[], int], name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._answers = Counter(
            "mcsd:http_responses",
            "Answers, by route and status.",
            ("route", "status", "front"),
            registry=self._registry,
        )
        self._losses = Counter(
            "mcsd:replica_losses",
            "Requests whose replica has ended, before their answer began or after it.",
            ("begun", "front"),
            registry=self._registry,
        )
        self._replicas = Gauge("mcsd:replicas", "Replicas that run.", ("front",), registry=self._registry)
        self._name, self._count = name, replicas

    def observe_answer(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(route, str(status), self._name).inc()

    def observe_loss(self, begun: bool) -> None:
        """Count a request whose replica has ended."""
        self._losses.labels(str(begun).lower(), self._name).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        self._replicas.labels(self._name).set(self._count())
        return generate_latest(self._registry)


def merged(texts: Iterable[bytes]) -> bytes:
    """Texts in Prometheus' format as one, in which each metric has its lines together and its description once."""
    metrics: dict[bytes, list[bytes]] = {}
    for text in texts:
        for block in text.split(b"# HELP ")[1:]:
            name = block[: block.index(b" ")]
            if name not in metrics:
                metrics[name] = [b"# HELP " + block]
            else:
                metrics[name].append(block.split(b"\n", 2)[2])
    return b"".join(b"".join(blocks) for blocks in metrics.values())
