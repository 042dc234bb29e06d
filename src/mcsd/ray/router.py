"""The router of Ray Serve. Ray pickles this module by value, so what a process shares is in `mcsd.ray.routing`."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mcsd.ray.routing import choose, note_replicas


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018), of the request's beginning.

    Replicas are ranked by a hash of the beginning and their name. The first one with fewer requests than the bound gets
    the request: equal beginnings meet on one replica, or on as many as they need. A replica that ends or is added moves
    only its own share of beginnings. No router asks another one, nor a central place.

    The call to route has the keyword arguments ``beginning`` and ``avoid``, a list of replicas that have lost it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for a request; then two others, for the case that it takes no more."""
        if not candidate_replicas:
            return []
        fields: dict[str, Any] = {} if pending_request is None else pending_request.kwargs
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        avoid = fields.get("avoid", ())
        replicas = [each for each in candidate_replicas if each.replica_id.unique_id not in avoid] or candidate_replicas
        running = [self.replica_queue_len_cache.get(each.replica_id) or 0 for each in replicas]
        names = [each.replica_id.unique_id for each in replicas]
        first = replicas[choose(fields.get("beginning", ""), names, running)]
        return [[first], random.sample(replicas, min(2, len(replicas)))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run now."""
        super().update_replicas(replicas)
        note_replicas(self.app_name, len(self.curr_replicas))

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Forget a replica."""
        super().on_replica_actor_died(replica_id)
        note_replicas(self.app_name, len(self.curr_replicas))
