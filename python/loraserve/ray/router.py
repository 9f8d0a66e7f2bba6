"""`RankedRouter`: Ray Serve's request router that takes calls where they are ranked to go.

`Placement` ranks: it knows adapters, prefixes and what is under way, request by request, where Serve's
routers are told of queues now and then.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RankedRouter(RequestRouter):  # type: ignore[misc]
    """The first argument of a call is its `Ranking`; of a call without one any replica is as good."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank; those that are not ranked come last, should all others be gone."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ranking = _ranking(pending_request)
        place = {replica_id: index for index, replica_id in enumerate(ranking)}
        ordered = sorted(
            candidate_replicas, key=lambda one: place.get(one.replica_id.unique_id, len(ranking))
        )
        return [[one] for one in ordered]


def _ranking(pending_request: PendingRequest | None) -> tuple[str, ...]:
    args = () if pending_request is None else pending_request.args
    return args[0] if args and isinstance(args[0], tuple) else ()
