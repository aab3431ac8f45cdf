"""Progress of a training run as a person sees it: a bar on a terminal, else a plain line every few seconds.

The worker that trains writes metrics.jsonl, maybe on another machine; whoever started the run follows that file. A run
that starts again from its last checkpoint rewrites the file; steps that were shown already are not shown twice.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from trinity.observability.scores import of_rows
from trinity.observability.train_log import main_lr, parse_row

PLAIN_LINE_EVERY_S = 5.0
POLL_S = 0.2
SHOWN = ("accuracy", "reward")  # of an objective's measures


class Progress:
    """Shows rows of metrics.jsonl on `screen`, in the order they come, from step `done` + 1 on. Call `close` at the end.

    `tokens_per_step`: 0 where steps differ."""

    def __init__(
        self,
        total_steps: int,
        tokens_per_step: int,
        screen: TextIO,
        done: int = 0,
        clock_s: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.tokens_per_step, self._screen = total_steps, tokens_per_step, screen
        self._clock_s, self._shown_s = clock_s, -math.inf
        self._recent: deque[dict[str, Any]] = deque(maxlen=20)
        self._last_step = self._last_eval = done
        self._last_scores = done if done else -1
        self._bar: tqdm | None = None

    def row(self, row: dict[str, Any]) -> None:
        """A step, a validation or scores; the first one is preceded by a line on the whole run."""
        if row["step"] > self._last_step and not self._recent:
            steps, tokens = self.total_steps, self.tokens_per_step
            self._print(f"{steps:,} steps" + (f" of {tokens:,} tokens, {steps * tokens:,} in all" if tokens else ""))
            if self._screen.isatty():
                self._bar = tqdm(total=steps, initial=self._last_step, file=self._screen, unit="step")
        if "val_loss" in row:
            self._eval(row["step"], row["val_loss"], row.get("val_measures"))
        elif "scores" in row:
            self._scores(row["step"], row["scores"])
        elif row["step"] > self._last_step:
            self._step(row)

    def close(self) -> None:
        """Finish the bar. Harmless when repeated."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _step(self, row: dict[str, Any]) -> None:
        self._recent.append(row)
        now_s, step = self._clock_s(), row["step"]
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(), refresh=False)
            self._bar.update(step - self._last_step)
        elif now_s - self._shown_s >= PLAIN_LINE_EVERY_S or step == self.total_steps:
            self._shown_s = now_s
            self._print(f"step {step}/{self.total_steps}  {self._numbers()}  eta {self._eta()}")
        self._last_step = step

    def _eval(self, step: int, loss: float | None, measures: Mapping[str, float] | None = None) -> None:
        if step > self._last_eval and (loss is not None or measures):
            self._last_eval = step
            told = "" if loss is None else f"  val loss {loss:.4f}"
            if not measures and loss is not None:
                told += f"  perplexity {math.exp(min(loss, 700.0)):.1f}"
            told += "".join(f"  val {name.replace('_', ' ')} {value:.3f}" for name, value in (measures or {}).items())
            self._print(f"step {step}/{self.total_steps}{told}")

    def _scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if step > self._last_scores:
            self._last_scores = step
            for score in of_rows(rows):
                self._print(f"step {step}/{self.total_steps}  {score.sentence}")

    def _numbers(self) -> str:
        """The last step's, and the throughput of the last 20. A number that was not finite shows as nan."""
        last = {key: math.nan if value is None else value for key, value in self._recent[-1].items()}
        rate = sum(r["tokens"] for r in self._recent) / max(sum(r["seconds"] for r in self._recent), 1e-9)
        text = (
            f"loss {last['loss']:.3f}  grad {last['grad_norm']:.2f}  lr {main_lr(last):.1e}  tok/s {rate:,.0f}"
            f"  maxvio {last['max_vio']:.2f}"
        )
        told: Mapping[str, float] = self._recent[-1].get("measures", {})
        text += "".join(f"  {name} {told[name]:.2f}" for name in SHOWN if told.get(name) is not None)
        return text + (f"  skipped {last['skipped']}" if last["skipped"] else "")

    def _eta(self) -> str:
        mean_s = sum(r["seconds"] for r in self._recent) / len(self._recent)
        left_s = round(mean_s * (self.total_steps - self._recent[-1]["step"]))
        return tqdm.format_interval(left_s).removeprefix("0")

    def _print(self, line: str) -> None:
        tqdm.write(line, file=self._screen)  # above the bar, if there is one
        self._screen.flush()


class Follower:
    """Rows as they are appended to a file that may not exist yet and may be replaced by another."""

    def __init__(self, file: Path):
        self.file, self._inode, self._offset = file, 0, 0
        if file.is_file():  # what is there already was shown by the run before
            self._inode, self._offset = file.stat().st_ino, file.stat().st_size

    def new_rows(self) -> Iterator[dict[str, Any]]:
        if not self.file.is_file():
            return
        with self.file.open("rb") as stream:
            inode = self.file.stat().st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            stream.seek(self._offset)
            whole, _, _ = stream.read().rpartition(b"\n")
        if whole:
            self._offset += len(whole) + 1
            yield from (row for line in whole.decode().splitlines() if (row := parse_row(line)))


@contextmanager
def shown(file: Path, progress: Progress) -> Iterator[None]:
    """Show what is appended to `file` while the block runs, and the rest of it at the end."""
    follower, done = Follower(file), threading.Event()

    def follow() -> None:
        while not done.wait(POLL_S):
            for row in follower.new_rows():
                progress.row(row)

    thread = threading.Thread(target=follow, name="trinity-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for row in follower.new_rows():
            progress.row(row)
        progress.close()
