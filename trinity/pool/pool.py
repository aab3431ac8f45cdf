"""The pool of expert shards as its users see it: one table, one transport, and what is asked of all shards at once.

The same class stands over shards in this process (local.py) and over Ray actors (actors/pool.py); what differs are its parts:
view, transport and ledger. Control calls go to every shard side by side and wait for all of them.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from trinity.config import ModelConfig
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.transport import Transport
from trinity.dispatch.view import PlacementView
from trinity.errors import ConfigError, StepConflict, Unavailable
from trinity.placement.table import PlacementTable
from trinity.pool.ledger import Decision, LocalLedger, StepLedger, StepTicket
from trinity.rpc.messages import (
    Abort,
    BytesRead,
    Commit,
    Load,
    Part,
    Prepare,
    Progress,
    Save,
    ShardStatus,
    Stage,
    Status,
    StepReport,
)
from trinity.state.versioned_store import Version
from trinity.utils.trying import retrying


class ExpertPool:
    """All experts of one model. Stateless but for the table it follows; as many as there are callers may exist.

    ledger: what remembers the steps of a training job; default: that of shards in this process.
    rows_over: what one caller thread sends its rows through, made from the transport; default: the transport itself.
    near_rows: calls of up to so many go to the nearest replicas.
    attempt_s: at most, for a shard to compute rows that another one could compute, too.
    expert_dtypes: see the property.
    """

    def __init__(
        self,
        view: PlacementView,
        transport: Transport,
        timeout_s: float,
        checkpoint_timeout_s: float = 3600.0,
        attempt_s: float = math.inf,
        *,
        near_rows: int = 0,
        ledger: StepLedger | None = None,
        expert_dtypes: Sequence[str] = (),
        rows_over: Callable[[Transport], Transport] = lambda transport: transport,
    ):
        self.view, self.transport = view, transport
        self.ledger: StepLedger = LocalLedger(view) if ledger is None else ledger
        self.timeout_s, self.checkpoint_timeout_s, self.attempt_s = timeout_s, checkpoint_timeout_s, attempt_s
        self._rows_over, self.near_rows = rows_over, near_rows
        self._expert_dtypes = tuple(expert_dtypes)

    @property
    def table(self) -> PlacementTable:
        return self.view.table

    def dispatcher(self, version: int = 0, timeout_s: float | None = None) -> Dispatcher:
        """A new caller's expert layer, which follows experts as they move. One per thread. `timeout_s`: for a layer's rows,
        wherever they have to go; default: the pool's."""
        timeouts = {"timeout_s": timeout_s or self.timeout_s, "attempt_s": self.attempt_s}
        rows = self._rows_over(self.transport)
        return Dispatcher(self.view, rows, **timeouts, version=version, near_rows=self.near_rows)

    @property
    def expert_dtypes(self) -> Sequence[str]:
        """Forms that its shards were asked to compute experts in; none: one form, whichever it is."""
        return self._expert_dtypes

    # -- what a training job decides: the ledger's words

    def set_source(self, message: Load) -> None:
        self.ledger.set_source(message)

    def begin_attempt(self, version: int, num_updates: int) -> StepTicket:
        return self.ledger.begin_attempt(version, num_updates)

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        self.ledger.begin(version, notes)

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        self.ledger.decide(step, attempt, notes)

    def approve(self, version: int) -> None:
        self.ledger.approve(version)

    def decided(self) -> Decision | None:
        return self.ledger.decided()

    def backbone(self, version: int) -> Version:
        return self.ledger.backbone(version)

    # -- what is asked of all shards

    def load(self, message: Load) -> int:
        """Every shard loads its part, now and whenever it starts again; -> the version that all of them now hold, the first of
        a line. Raises ConfigError, before anything is read, where shards are of several forms that nobody asked for."""
        check_forms(self.status(), self.expert_dtypes)
        message = replace(message, line=self.ledger.new_line())
        self.set_source(message)
        return self._agree(self._all("load", message))

    def follow(self, epoch: int) -> None:
        """Wait until this process knows that table. Raises Unavailable when it does not hear of it."""
        until_s = time.monotonic() + self.timeout_s
        while self.table.epoch < epoch:
            self.view.refresh()
            if time.monotonic() > until_s:
                raise Unavailable(
                    f"placement epoch {epoch} is not known here after {self.timeout_s:.0f} s; is the service away?"
                )

    def versions(self) -> dict[str, int]:
        return {status.shard: status.version for status in self.status()}

    def status(self, reset_counts: bool = False) -> list[ShardStatus]:
        return self._all("status", Status(reset_counts))

    def progress(self) -> tuple[int, int]:
        """Bytes that the load under way has read, and all that it will, where all shards have begun."""
        each: list[BytesRead] = self._all("progress", Progress())
        return sum(read.done for read in each), sum(read.total for read in each)

    def prepare(self, step: int, num_sent_ops: Counter[str], attempt: int = 0) -> list[StepReport]:
        """Ask every shard what it has for `step`. Raises StepConflict when one has not applied exactly so many."""
        table = self.table  # another one may come while they are asked
        reports = self._send("prepare", dict.fromkeys(table.shards, Prepare(step, attempt, table.shared)))()
        for shard, report in zip(table.shards, reports, strict=True):
            if report.num_ops != num_sent_ops[shard]:
                raise StepConflict(
                    f"step {step}: shard {shard} applied {report.num_ops} backward ops of {num_sent_ops[shard]} sent"
                )
        return reports

    def stage(self, message: Stage) -> Callable[[], bool]:
        """Every shard makes the next weights; call the answer to wait: are all finite?"""
        wait = self._send("stage", dict.fromkeys(self.table.shards, message))
        return lambda: all(wait())

    def commit(self, step: int) -> int:
        return self._agree(self._all("commit", Commit(step)))

    def abort(self, step: int, attempt: int = 0) -> int:
        return self._agree(self._all("abort", Abort(step, attempt)))

    def save(self, folder: str, version: int) -> Callable[[], list[Part]]:
        """Every shard writes the experts it is the primary of, in parallel; call the answer to wait for the files. Steps may go
        on once the shards have seen the message: it is theirs before any later one."""
        table = self.table
        wait = self._send("save", {s: Save(folder, table.primaries_of(s), version) for s in table.shards})
        return lambda: [part for parts in wait() for part in parts]

    def _all(self, verb: str, message: Any) -> list[Any]:
        return self._send(verb, dict.fromkeys(self.table.shards, message))()

    def _send(self, verb: str, messages: Mapping[str, Any]) -> Callable[[], list[Any]]:
        """Begin to ask shards; call the answer to wait for theirs, in the order of the messages."""
        replies = {shard: self.transport.send(shard, verb, message) for shard, message in messages.items()}
        deadline_s = time.monotonic() + (self.checkpoint_timeout_s if verb in ("load", "save") else self.timeout_s)
        return lambda: [
            retrying(partial(self._ask, shard, verb, messages), deadline_s, first=reply.result)
            for shard, reply in replies.items()
        ]

    def _ask(self, shard: str, verb: str, messages: Mapping[str, Any]) -> Any:
        """Send it once more. Where one of those that were asked has left the table since, nobody waits for it, nor for another
        that needs it."""
        if gone := messages.keys() - set(self.table.shards):
            raise StepConflict(f"{', '.join(sorted(gone))} left the pool while {shard} was asked to {verb}")
        return self.transport.send(shard, verb, messages[shard]).result()

    def _agree(self, versions: list[int]) -> int:
        if len(set(versions)) != 1:
            held = ", ".join(f"{s}: {v}" for s, v in zip(self.table.shards, versions, strict=False))
            raise StepConflict(f"shards hold different versions ({held}); restart from the last checkpoint")
        return versions[0]


def check_forms(shards: Iterable[ShardStatus], asked: Sequence[str]) -> None:
    """Raise ConfigError where shards compute experts in forms that were not asked for; `asked` none: in more than one."""
    shards_of: dict[str, list[str]] = {}
    for status in shards:
        shards_of.setdefault(status.expert_dtype, []).append(status.shard)
    if (asked and not shards_of.keys() <= {*asked}) or (not asked and len(shards_of) > 1):
        found = "; ".join(f"{form} on {', '.join(names)}" for form, names in sorted(shards_of.items()))
        raise ConfigError(
            f"the pool's shards compute experts as {found}, which was not asked for: make them of one form, or name all of "
            f"them in placement.expert_dtype, which is {', '.join(asked) or 'not set'}"
        )


def describe(shards: list[ShardStatus], model: ModelConfig) -> str:
    """One line on who computes the experts, and with what."""
    backends = ", ".join(sorted({f"{s.backend} backend on {s.device}" for s in shards}))
    experts = len(model.moe_layers) * model.num_experts
    forms = sorted({s.expert_dtype for s in shards} - {model.dtype})
    also = "".join(f", computed as {form}" for form in forms)
    kernels = " and ".join(sorted({s.computes.partition(":")[0] for s in shards}))
    num_bytes = (
        sum(s.weight_bytes for s in shards) or experts * model.expert_params * model.itemsize
    )  # 0: none are here yet
    mib = num_bytes / 2**20
    return f"{experts:,} experts, {mib:,.1f} MiB{also}, in {len(shards)} shard actors: {backends} by {kernels}"
