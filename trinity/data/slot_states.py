"""States of a buffer's slots on disk, so that a run which resumes far from its beginning replays little.

Decisions. A state follows from lengths and the seed; one that is missing, damaged or cannot be written costs the time to
replay, nothing else. Every EVERY sequences of a slot one is written, not those of all slots in one step, and renamed when
complete; whoever comes to the same place writes the same. KEPT of the newest stay: a run goes on from its last checkpoints.
"""

import logging
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from trinity.utils.trying import tried

EVERY, KEPT = 1000, 4

log = logging.getLogger(__name__)


class SlotStates:
    """States in a folder that is of one order alone: int64 arrays that begin with the number of sequences before."""

    def __init__(self, folder: Path):
        self.folder, self._is_writable = folder, True

    def is_due(self, slot: int, number: int) -> bool:
        """Say whether the state before that sequence is one to keep."""
        return self._is_writable and number > 0 and (number + slot) % EVERY == 0

    def save(self, slot: int, state: np.ndarray) -> None:
        """Write it; a disk that refuses is said once."""
        number = int(state[0])
        oldest = self._file(slot, number - KEPT * EVERY)
        found = tried(lambda: self._write(self._file(slot, number), state, oldest), OSError)
        if isinstance(found, OSError):
            self._is_writable = False
            log.warning("states of the buffer are not kept (%s): a run that resumes replays from its beginning", found)

    def latest(self, slot: int, number: int) -> np.ndarray | None:
        """The newest state at or before a sequence; None without any."""
        newest = number - (number + slot) % EVERY
        found = (self._read(self._file(slot, each)) for each in range(newest, 0, -EVERY))
        return next((state for state in found if state is not None), None)

    def _file(self, slot: int, number: int) -> Path:
        return self.folder / f"{slot}-{number}.npy"

    def _write(self, file: Path, state: np.ndarray, oldest: Path) -> None:
        scratch = file.with_name(f".{file.name}-{uuid.uuid4().hex}.npy")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            np.save(scratch, np.append(state, zlib.crc32(state.tobytes())))
            scratch.rename(file)
            oldest.unlink(missing_ok=True)
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)

    def _read(self, file: Path) -> np.ndarray | None:
        """A whole state, else None."""
        found = tried(lambda: np.load(file), OSError, ValueError, EOFError)
        if isinstance(found, Exception) or found.dtype != np.int64 or len(found) < 2:
            return None
        state: np.ndarray = found[:-1]
        return state if zlib.crc32(state.tobytes()) == found[-1] else None
