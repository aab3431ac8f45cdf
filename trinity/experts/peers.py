"""Questions of a shard to other shards, for rows of experts: the dispatcher's Transport, in the words that this package needs.

Decision: experts may not import trinity.dispatch, which lies above them; whatever is a Transport fits here as it is.
"""

from typing import Any, Protocol

from torch import Tensor

from trinity.rpc.messages import Fetch


class Answer(Protocol):
    """An answer on its way."""

    def result(self) -> Any:
        """Wait for it. Raises the TrinityError that the other shard or the way to it raised."""
        ...


class Peers(Protocol):
    """Other shards by name."""

    def send(self, shard: str, verb: str, message: Any) -> Answer: ...


def fetched(peers: Peers, shard: str, call: Fetch) -> Tensor:
    """rows_ND of an expert that another shard holds. Raises what the peers raise."""
    rows_ND: Tensor = peers.send(shard, "fetch", call).result()
    return rows_ND
