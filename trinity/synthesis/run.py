"""A run: shards are asked in parallel, and finished one after the other, each exactly once.

Decisions.
- In `output.dir`: `data/` has a shard of rows for each input file, a source like any other; `left_out/` the rows that are not
  there, with the reason; `shards/` a record of each; `partial/` journals of those that are not finished.
- A shard is finished when it has its name in `data/`: its other files are written before, all beside and renamed. So a run that
  is killed anywhere goes on with the shards that are missing, and asks no question of a journal again.
- Shards are finished in the order of the input, each against the documents that those before it kept: which of two duplicates
  stays does not depend on who was faster.
- A folder belongs to one set of settings and one run at a time; both are checked before anything is asked.
"""

import asyncio
import fcntl
import json
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal

from trinity.config import SynthesisConfig, differences
from trinity.data.documents import stamps
from trinity.data.formats import rows
from trinity.errors import ConfigError, DataError
from trinity.synthesis.duplicates import Duplicates
from trinity.synthesis.files import JsonLines, replaced
from trinity.synthesis.journal import Journal, named
from trinity.synthesis.maker import Maker, Shard, content_of, shards_of
from trinity.synthesis.report import Tally
from trinity.utils.terminal import say
from trinity.utils.trying import tried

SETTINGS, LOCK = "settings.json", ".lock"
LOOK_S = 1.0
Made = Callable[[list[Shard]], Generator[str, None, None]]  # makes journals; -> names of shards as they become whole


class Run:
    """The folder of a run, and which of its shards are finished."""

    def __init__(self, config: SynthesisConfig):
        self.config, self.folder = config, Path(config.output.dir)
        self.shards = shards_of(config.input.paths)

    @property
    def missing(self) -> list[Shard]:
        return [shard for shard in self.shards if not self.data(shard).exists()]

    def data(self, shard: Shard) -> Path:
        return self.folder / "data" / f"{shard.name}.jsonl{self.config.output.packing}"

    def record(self, shard: Shard) -> Path:
        return self.folder / "shards" / f"{shard.name}.json"

    def records(self) -> Iterator[dict[str, Any]]:
        """Records of the finished shards."""
        for shard in self.shards:
            if self.data(shard).exists():
                yield self._recorded(shard)

    def _recorded(self, shard: Shard) -> dict[str, Any]:
        found = tried(lambda: json.loads(self.record(shard).read_text()), OSError, ValueError)
        if isinstance(found, Exception):
            raise DataError(
                f"{self.record(shard)} cannot be read ({found}); remove {self.data(shard)} to make it again"
            )
        return dict(found)

    @contextmanager
    def owned(self, model: str) -> Iterator[None]:
        """The folder is this run's alone in the block, and of its settings. Raises ConfigError where it is another run's or of
        other settings, DataError where an input file has changed since, Unavailable where the disk refuses."""
        with named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another run writes to {self.folder}; wait for it, or set another output.dir"
                ) from None
            self._check_settings(model)
            self._check_sources()
            yield

    def synthesize(self, made: Made) -> None:
        """Make and finish every shard that is missing. Raises what ended it; to call it again goes on."""
        missing = self.missing
        say(f"{len(missing):,} of {len(self.shards):,} shards are to be made in {self.folder}")
        if missing:
            self._finish_all(missing, made)

    def _finish_all(self, missing: list[Shard], made: Made) -> None:
        """Finish shards as they become whole, in their order."""
        duplicates, whole, waiting = self._kept_before(missing), set[str](), deque(missing)
        with closing(made(missing)) as names:
            for name in names:
                whole.add(name)
                while waiting and waiting[0].name in whole:
                    self._finish(waiting.popleft(), duplicates)

    def _finish(self, shard: Shard, duplicates: Duplicates) -> None:
        """Write a shard's files from its journal; the last one to get its name is the shard itself."""
        journal = Journal(self.folder / shard.journal, None)
        try:
            assert journal.summary, f"{shard.name} is not whole"
            tally = Tally(journal.summary)
            left = JsonLines(self.folder / "left_out" / f"{shard.name}.jsonl", "")
            with JsonLines(self.data(shard), self.config.output.packing) as data, left:
                for entry in journal.entries():
                    reason = self._sort(entry, duplicates, data, left)
                    tally.add(entry, reason)
                left.finish()
                record = {**journal.head, "stamp": stamps([shard.file]), **tally.record}
                replaced(self.record(shard), json.dumps(record, indent=1))
                data.finish()
        finally:
            journal.close()
        journal.path.unlink()
        kept = sum(counts.get("kept", 0) for counts in tally.record["styles"].values())
        say(f"{shard.file}: {kept:,} rows")

    def _sort(self, entry: dict[str, Any], duplicates: Duplicates, data: JsonLines, left: JsonLines) -> str | None:
        """Write an entry to where it belongs; -> why it is left out."""
        row: dict[str, Any] = entry.get("row", {})
        reason: str | None = entry["reason"] or duplicates.reason_of(words_of(row))
        if reason is None:
            duplicates.add(words_of(row))
            data.write({**row, "provenance": entry["provenance"]})
        else:
            said = entry.get("said") or words_of(row)
            left.write({"reason": reason, "said": said, "provenance": entry["provenance"]})
        return reason

    def _kept_before(self, missing: list[Shard]) -> Duplicates:
        """The documents of finished shards, as the first run that made them knew them."""
        found, names = Duplicates(self.config.dedup), {shard.name for shard in missing}
        for shard in self.shards:
            if shard.name not in names and (self.config.dedup.exact or self.config.dedup.near):
                for _, row in rows(self.data(shard)):
                    found.add(words_of(row))
        return found

    def _check_settings(self, model: str) -> None:
        """Raise ConfigError where the folder is of other settings; write them down in a new one."""
        mine, file = self.config.of_rows, self.folder / SETTINGS
        mine["server"]["model"] = model
        if not file.exists():
            replaced(file, json.dumps(mine, indent=1))
            return
        try:
            theirs = json.loads(file.read_text())
        except ValueError:
            raise ConfigError(f"{file} is damaged; set another output.dir") from None
        if found := differences(theirs, mine):
            raise ConfigError(
                f"{self.folder} was begun with other settings: {'; '.join(found)}. Set them as before, or another output.dir"
            )

    def _check_sources(self) -> None:
        """Raise DataError for an input file whose shard was made from another content."""
        for shard in self.shards:
            if self.data(shard).exists():
                record = self._recorded(shard)
                if record["stamp"] != stamps([shard.file]) and record["sha256"] != content_of(shard.file):
                    raise DataError(
                        f"{shard.file} has changed since {self.data(shard)} was made from it; remove that to make it again"
                    )


def words_of(row: dict[str, Any]) -> str:
    """All that is trained of a row."""
    return str(row["text"]) if "text" in row else "\n".join(each["content"] for each in row.get("messages", ()))


def made_here(maker: Maker, shards: list[Shard]) -> Generator[str, None, None]:
    """Make journals in this process, on a thread of their own; -> names, as they become whole. Closing it ends the asking."""
    names = queue.SimpleQueue[str | None]()

    async def begin() -> "asyncio.Task[None]":
        task = asyncio.create_task(maker.make(shards, lambda shard: names.put(shard.name)))
        task.add_done_callback(lambda _: names.put(None))
        return task

    with start_blocking_portal() as portal:
        task = portal.call(begin)
        try:
            yield from _until_none(names)
            task.result()
        finally:
            portal.call(_end, task)


def _until_none(names: "queue.SimpleQueue[str | None]") -> Iterator[str]:
    """Items as they come. A signal that comes between Python's look for signals and the wait is seen after the wait, so none
    is long."""
    while (name := tried(partial(names.get, timeout=LOOK_S), queue.Empty)) is not None:
        if not isinstance(name, queue.Empty):
            yield name


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
