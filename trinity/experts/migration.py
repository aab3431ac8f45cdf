"""Migration of experts into a shard: it fetches rows, one expert at a time, and installs a layer's together."""

import time

from torch import Tensor

from trinity.checkpoint import open_checkpoint
from trinity.errors import StepConflict, VersionGone
from trinity.experts.derived import form_of
from trinity.experts.loading import read_expert, read_form
from trinity.experts.peers import Peers, fetched
from trinity.experts.shard import ExpertShard
from trinity.experts.spec import ShardSpec
from trinity.experts.stacked import derived_rows, is_value
from trinity.optim.optimizer import MASTER
from trinity.rpc.messages import WEIGHT, Copy, Fetch, Install, Load

FETCH_S = 60.0  # for one expert's rows


def migrate_in(shard: ExpertShard, message: Copy, peers: Peers, source: Load | None) -> int:
    """Take up the experts of the message; -> bytes fetched. The shard goes on computing meanwhile, but for the moment of
    installing.

    Raises what the peers raise, and StepConflict when they or this shard are not at the message's version: then nothing has
    been taken up.
    """
    held = shard.weights.holds(message.version, message.layer)
    new = [pair for pair in zip(message.experts, message.sources, strict=True) if pair[0] not in held]
    rows = {
        kind: tuple(_rows(shard, message, *pair, kind, peers, source) for pair in new)
        for kind in shard.weights.kinds(message.version)
    }
    names = tuple(expert for expert, _ in new)
    about = message.num_updates, message.epoch, message.line
    shard.install(Install(message.layer, names, message.version, rows, *about))
    return sum(found.nbytes for kind in rows.values() for found in kind)


def _rows(
    shard: ExpertShard, message: Copy, expert: int, origin: str, kind: str, peers: Peers, source: Load | None
) -> Tensor:
    """rows_ND of an expert from the shard that holds it; from the pool's source where `origin` is "", or a shard that has it
    in another form alone. Where both train, a form that the other does not have is made here of what it is made of there."""
    form = form_of(kind)
    is_made_here = form is not None and origin != "" and shard.spec.dtype_at(origin) != form.name
    if is_made_here and shard.spec.optim is not None:
        assert form is not None
        rows_ND = _fetched(message, expert, origin, _made_of(shard, message), peers)
        return derived_rows(rows_ND, form, shard.spec.model)
    if origin and not is_made_here and not (form is None and _has_form_alone(shard.spec, origin)):
        return _fetched(message, expert, origin, kind, peers)
    if source is None or not is_value(kind) or message.version < shard.version:
        raise StepConflict(
            f"expert ({message.layer}, {expert}) is on no shard, and its {kind} in no checkpoint of this version; go back "
            "to the last checkpoint"
        )
    return _from_source(shard.spec, message.layer, expert, source, kind)


def _fetched(message: Copy, expert: int, origin: str, kind: str, peers: Peers) -> Tensor:
    deadline_s = min(message.deadline_s, time.monotonic() + FETCH_S)
    return fetched(peers, origin, Fetch(message.layer, expert, message.version, deadline_s, kind))


def _made_of(shard: ExpertShard, message: Copy) -> str:
    """The kind of rows that a form is made of at that version. Raises VersionGone where only its rounded weights are kept."""
    kinds, optim = shard.weights.kinds(message.version), shard.spec.optim
    if MASTER in kinds:
        return MASTER
    if optim is not None and optim.trains_experts and shard.spec.model.itemsize < 4:
        raise VersionGone(
            f"version {message.version} is kept without its fp32 master, of which {shard.spec.expert_dtype} is made"
        )
    return WEIGHT


def _has_form_alone(spec: ShardSpec, origin: str) -> bool:
    """Say whether a shard of a pool that serves has its experts in another form than the model's, and not as they are."""
    return spec.optim is None and spec.dtype_at(origin) != spec.model.dtype


def _from_source(spec: ShardSpec, layer: int, expert: int, source: Load, kind: str) -> Tensor:
    """The answer of `fetch`, from the weights in a checkpoint or from the seed."""
    checkpoint = open_checkpoint(source.checkpoint) if source.checkpoint else None
    asked = checkpoint, spec.model, layer, expert, source.seed
    form = form_of(kind)
    return read_expert(*asked).to(spec.dtype) if form is None else read_form(*asked, form)
