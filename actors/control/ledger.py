"""Ledger of a pool's decisions: which version counts, who is at work on the next one, which older ones are still needed.

Decisions: files replaced by rename, before anybody hears of it, so that a restart finds the last word; without waiting for
the disk, because what they speak of lies in memory and is gone with the machine anyway. An attempt's number is the time in
microseconds, and grows: whoever holds an older one has been replaced. So does a line's, in seconds. A job knows its steps;
those who compute with them name a step with its line (trinity/utils/lines.py), so that none passes for the same step of a run
that has gone back. Pins are leases.
"""

import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trinity.errors import Overloaded, StepConflict, Superseded, Unavailable, VersionGone
from trinity.pool.ledger import Decision
from trinity.utils.lines import line_of, named, step_of

MAX_PINNED = 4
OLD_LEASE_S = 60.0  # of pins in files that had a time of day instead


@dataclass(frozen=True)
class State:
    """The file's content."""

    decision: dict[str, Any] | None = None
    attempt: int = 0
    line: int = 0  # of what shards load now
    bad: list[int] = field(default_factory=list)
    good: int = -1  # the newest step that may be served
    pins: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pin:
    """Holds until it is not renewed for `lease_s`; after a restart for that long again."""

    version: int  # by its name
    lease_s: float


class Ledger:
    """Safe from any thread: `changed` is its lock, and where others wait for its news. `folder` must be the same after a
    restart; `is_new`: what is there is of another pool of that name."""

    def __init__(self, folder: Path, changed: threading.Condition, is_new: bool = False):
        self._file, self._changed = folder / "record.json", changed
        if is_new:
            self._file.unlink(missing_ok=True)
        tree = json.loads(self._file.read_text()) if self._file.is_file() else {}
        pins = {holder: {"lease_s": OLD_LEASE_S, **pin} for holder, pin in tree.get("pins", {}).items()}
        for pin in pins.values():
            pin.pop("until_s", None)
        self._state = replace(State(**tree), pins=pins)
        self._renewed_s = dict.fromkeys(pins, time.monotonic())

    @property
    def decision(self) -> Decision | None:
        found = self._state.decision
        return Decision(**found) if found else None

    @property
    def version(self) -> int:
        """Version that was decided last; -1 before the first."""
        found = self._state.decision
        return found["version"] if found else -1

    @property
    def line(self) -> int:
        """The line of the last decision; before the first, of what shards have loaded."""
        return self._state.line if self.decision is None else self.decision.line

    @property
    def next_line(self) -> int:
        """The line of what shards load now, or have loaded last."""
        return self._state.line

    # -- the job

    def new_line(self) -> int:
        """Begin a line: whatever is loaded from here on is of it, and the job that begins then."""
        with self._changed:
            line = max(self._state.line + 1, time.time_ns() // 1_000_000_000)
            self._become(line=line)
            return line

    def new_attempt(self, version: int) -> int:
        """Begin an attempt at the step after that version; whatever older ones still have under way is void from here on.

        Raises Superseded where another version was decided last: shards would let go of what they have staged of it.
        """
        with self._changed:
            if self.decision is not None and version != self.version:
                raise Superseded(f"version {self.version} is the last that was decided; nobody goes on from {version}")
            attempt = self._next_attempt()
            self._become(attempt=attempt)
            return attempt

    def begin(self, version: int, notes: Mapping[str, Any]) -> None:
        """A job starts from that version, whatever there was before; attempts of before are void."""
        with self._changed:
            attempt = self._next_attempt()
            decision = {"version": version, "notes": {**notes, "line": self._state.line}}
            self._become(decision=decision, attempt=attempt, bad=[], good=version, pins={})

    def decide(self, step: int, attempt: int, notes: Mapping[str, Any]) -> None:
        """Harmless when repeated. Raises StepConflict for an attempt that was given up, or a step that does not follow."""
        with self._changed:
            if attempt != self._state.attempt:
                raise StepConflict(f"attempt {attempt:x} at step {step} was given up for {self._state.attempt:x}")
            if step == self.version:
                return
            if step != self.version + 1:
                raise StepConflict(f"version {self.version} is the last that was decided; step {step} does not follow")
            good = step if notes.get("is_good", True) else self._state.good
            self._become(decision={"version": step, "notes": {**notes, "line": self.line}}, good=good)

    def approve(self, version: int) -> None:
        """Serve that version, the last one. Harmless when repeated, and for one that has been trained on or gave numbers that
        are none."""
        with self._changed:
            if version == self.version and version not in self._state.bad:
                self._become(good=version)

    # -- those who compute with its versions

    @property
    def serving(self) -> int:
        """The version that live engines use, by its name; -1 before the first."""
        return named(self.line, self._state.good)

    def quarantine(self, version: int) -> int:
        """A version gave numbers that are none: nobody is to be served from it; -> the version to use."""
        with self._changed:
            if line_of(self._named(version)) != self.line:
                return self.serving
            step = step_of(version)
            bad, good = {*self._state.bad, step}, self._state.good
            older = [n for n in (step - 1, *self.keep()) if 0 <= n < step and n not in bad]
            self._become(bad=sorted(bad), good=max(older) if step == good and older else good)
            return self.serving

    def pin(self, version: int | None, holder: str, lease_s: float) -> int:
        """Keep a version (None: the one that is served now; without a line: that step now) for `holder` until the lease ends;
        -> its name. Renew by asking again. Raises VersionGone for one that is gone, Overloaded beyond MAX_PINNED. The version
        before the present one is there until the next step is staged, whose attempt will know of the pin."""
        with self._changed:
            wanted, pins = self.serving if version is None else self._named(version), self.pins()
            self._check_pin(wanted, {pin.version for pin in pins.values()})
            self._hold({**pins, holder: Pin(wanted, lease_s)})
            self._renewed_s[holder] = time.monotonic()
            return wanted

    def unpin(self, holder: str) -> None:
        with self._changed:
            self._hold({name: pin for name, pin in self.pins().items() if name != holder})

    def pins(self) -> dict[str, Pin]:
        """Those whose lease has not ended."""
        found, now_s = {holder: Pin(**pin) for holder, pin in self._state.pins.items()}, time.monotonic()
        return {
            holder: pin for holder, pin in found.items() if now_s - self._renewed_s.get(holder, now_s) < pin.lease_s
        }

    def keep(self) -> tuple[int, ...]:
        """Versions before the present one that shards must keep."""
        with self._changed:
            wanted = {self._state.good, *(step_of(pin.version) for pin in self.pins().values())}
            return tuple(sorted(n for n in wanted if 0 <= n < self.version))

    # -- inside

    def _next_attempt(self) -> int:
        return max(self._state.attempt + 1, time.time_ns() // 1000)

    def _named(self, version: int) -> int:
        """A version's name; of a step without a line, that of now."""
        return version if line_of(version) else named(self.line, version)

    def _check_pin(self, version: int, pinned: set[int]) -> None:
        steps, step = sorted(map(step_of, pinned)), step_of(version)
        if line_of(version) != self.line:
            raise VersionGone(f"version {step} has gone: the run went back, and its present version is {self.version}")
        if step not in {*steps, self.version, self.version - 1, self._state.good}:
            raise VersionGone(f"version {step} is not kept; the present one is {self.version}, pinned: {steps}")
        if version not in pinned and len(pinned) >= MAX_PINNED:
            raise Overloaded(f"{len(pinned)} versions are pinned, {MAX_PINNED} may be; use one of {steps}")

    def _hold(self, pins: Mapping[str, Pin]) -> None:
        self._become(pins={holder: asdict(pin) for holder, pin in pins.items()})
        self._renewed_s = {holder: since_s for holder, since_s in self._renewed_s.items() if holder in pins}

    def _become(self, **changes: Any) -> None:
        """Write it to the disk first: what could not be written is not so."""
        with self._changed:
            live = {holder: asdict(pin) for holder, pin in self.pins().items()}
            state = replace(self._state, **{"pins": live, **changes})
            partial = self._file.with_name(f".record-{secrets.token_hex(4)}")
            try:
                partial.write_text(json.dumps(asdict(state)))
                partial.rename(self._file)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise Unavailable(
                    f"cannot write {self._file}: {error.strerror}; the placement service needs room there"
                ) from None
            self._state = state
            self._changed.notify_all()
