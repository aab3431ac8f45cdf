"""Ray Serve's router for engines: a request goes to the replica that its gateway has named.

Decisions: the choice is the gateway's, which has the tokens and knows the engines (serving/routing.py); Serve's router does
what it does for any: queues, back-pressure, replicas that are gone or drain, scaling by queue. So it only orders replicas: the
one that is named first, those that are named as known already last. Serve pickles this module by value: it imports nothing else
of ours. Without names its own way is taken: of two drawn, the one with the shorter queue.
"""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ChosenReplica(RequestRouter):
    """Ranks of replicas by the arguments `engine` and `besides` of a request."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        asked = {} if pending_request is None else pending_request.kwargs
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else it spins while all are full
        name, known = asked.get("engine"), asked.get("besides", ())
        ranks: list[list[RunningReplica]] = [[], [], []]
        for replica in candidate_replicas:
            own = replica.replica_id.unique_id
            ranks[0 if own == name else 2 if own in known else 1].append(replica)
        return [random.sample(rank, min(2, len(rank))) for rank in ranks] + [candidate_replicas]
