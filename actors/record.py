"""What a pool has decided: which version counts, who is at work on the next one, which older ones are still needed.

Decisions: files replaced by rename, before anybody hears of it, so that a restart finds the last word; without waiting for
the disk, because what they speak of lies in memory and is gone with the machine anyway. An attempt's number is the time in
microseconds, and grows: whoever holds an older one has been replaced. Pins are leases.
"""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trinity.errors import Overloaded, StepConflict, VersionGone
from trinity.pool import Decision

MAX_PINNED = 4


@dataclass(frozen=True)
class Pin:
    version: int
    until_s: float  # time.time()


class Record:
    """Owned by the placement service, whose lock guards it. `folder` must be the same after a restart."""

    def __init__(self, folder: Path):
        self.folder = folder
        tree = json.loads(self._file.read_text()) if self._file.is_file() else {}
        found = tree.get("decision")
        self.decision = Decision(**found) if found else None
        self.attempt = int(tree.get("attempt", 0))
        self.bad: frozenset[int] = frozenset(tree.get("bad", ()))
        self.good = int(tree.get("good", -1))  # the newest version that may be served
        self._pins: dict[str, Pin] = {holder: Pin(**pin) for holder, pin in tree.get("pins", {}).items()}

    def forget(self) -> None:
        """Of another pool of that name."""
        self._file.unlink(missing_ok=True)
        self.__init__(self.folder)  # type: ignore[misc]

    # -- the job

    def new_attempt(self) -> int:
        """Whatever older attempts still have under way is void from here on."""
        self.attempt = max(self.attempt + 1, time.time_ns() // 1000)
        self._write()
        return self.attempt

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        """A job starts from that version, whatever there was before."""
        self.decision, self.bad, self.good, self._pins = Decision(version, dict(notes)), frozenset(), version, {}
        self._write()

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        """Harmless when repeated. Raises StepConflict for an attempt that was given up, or a step that does not follow."""
        now = -1 if self.decision is None else self.decision.version
        if attempt != self.attempt:
            raise StepConflict(f"attempt {attempt:x} at step {step} was given up for {self.attempt:x}")
        if step == now:
            return
        if step != now + 1:
            raise StepConflict(f"version {now} is the last that was decided; step {step} does not follow")
        self.decision = Decision(step, dict(notes))
        if notes.get("is_good", True):
            self.good = step
        self._write()

    # -- those who compute with its versions

    @property
    def serving(self) -> int:
        """The version that live engines use; -1 before the first."""
        return self.good

    def quarantine(self, version: int) -> int:
        """A version gave numbers that are none: nobody is to be served from it; -> the version to use."""
        self.bad |= {version}
        older = [n for n in (version - 1, *self.keep()) if 0 <= n < version and n not in self.bad]
        if version == self.good and older:
            self.good = max(older)
        self._write()
        return self.good

    def pin(self, version: int, holder: str, lease_s: float) -> None:
        """Keep a version for `holder` until the lease ends; renew by asking again. Raises VersionGone for one that is gone
        or will be in a moment, Overloaded beyond MAX_PINNED."""
        pinned = {pin.version for pin in self.pins().values()}
        now = -1 if self.decision is None else self.decision.version
        if version not in pinned | {now, self.good}:
            raise VersionGone(f"version {version} is not kept; the present one is {now}, pinned are {sorted(pinned)}")
        if version not in pinned and len(pinned) >= MAX_PINNED:
            raise Overloaded(f"{len(pinned)} versions are pinned, {MAX_PINNED} may be; use one of {sorted(pinned)}")
        self._pins[holder] = Pin(version, time.time() + lease_s)
        self._write()

    def unpin(self, holder: str) -> None:
        if self._pins.pop(holder, None) is not None:
            self._write()

    def pins(self) -> dict[str, Pin]:
        """Whose lease has not ended."""
        now_s = time.time()
        self._pins = {holder: pin for holder, pin in self._pins.items() if pin.until_s > now_s}
        return dict(self._pins)

    def keep(self) -> tuple[int, ...]:
        """Versions before the present one that shards must keep."""
        now = -1 if self.decision is None else self.decision.version
        wanted = {self.good, *(pin.version for pin in self.pins().values())}
        return tuple(sorted(n for n in wanted if 0 <= n < now))

    # -- inside

    @property
    def _file(self) -> Path:
        return self.folder / "record.json"

    def _write(self) -> None:
        tree = {
            "decision": asdict(self.decision) if self.decision else None,
            "attempt": self.attempt,
            "bad": sorted(self.bad),
            "good": self.good,
            "pins": {holder: asdict(pin) for holder, pin in self._pins.items()},
        }
        partial = self._file.with_name(f".record-{secrets.token_hex(4)}")
        partial.write_text(json.dumps(tree))
        partial.rename(self._file)
