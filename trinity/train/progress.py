"""Progress of a training run as a person sees it: a bar on a terminal, else a plain line every few seconds.

The worker that trains writes metrics.jsonl, maybe on another machine; whoever started the run follows that file. A run
that starts again from its last checkpoint rewrites the file; steps that were shown already are not shown twice.

Decision: the time until the end of all stages is guessed from the tokens of those that are to come, as fast as the last ones.
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

from trinity.observability.follow import Follower
from trinity.observability.scores import of_rows
from trinity.observability.train_log import main_lr

PLAIN_LINE_EVERY_S = 5.0
POLL_S = 0.2
SHOWN = ("accuracy", "reward")  # of an objective's measures


class Progress:
    """Shows rows of metrics.jsonl on `screen`, in the order they come, from step `done` + 1 on. Call `close` at the end.

    `num_before`: what the steps up to one have to do, in parts of `tokens_each`: steps themselves unless told otherwise. The
    tokens are 0 where nobody knows them before."""

    def __init__(
        self,
        total_steps: int,
        tokens_each: int,
        screen: TextIO,
        done: int = 0,
        clock_s: Callable[[], float] = time.monotonic,
        stage: str = "",
        tokens_after: int = 0,
        num_before: Callable[[int], int] = lambda step: step,
    ):
        """`stage` in words, where the run has several, and the tokens of those that come after it."""
        self._stage, self._tokens_after = stage, tokens_after
        self.total_steps, self._tokens_each, self._screen = total_steps, tokens_each, screen
        self._num_before = num_before
        self._clock_s, self._shown_s = clock_s, -math.inf
        self._recent: deque[dict[str, Any]] = deque(maxlen=20)
        self._last_step = self._last_eval = done
        self._last_scores = done if done else -1
        self._bar: tqdm | None = None

    def row(self, row: dict[str, Any]) -> None:
        """A step, a validation or scores; the first one is preceded by a line on the whole run."""
        if row["step"] > self._last_step and not self._recent:
            named = f"{self._stage}: " if self._stage else ""
            self._print(f"{named}{self.total_steps:,} steps{self._size()}")
            if self._screen.isatty():
                self._bar = tqdm(
                    total=self.total_steps,
                    initial=self._last_step,
                    file=self._screen,
                    unit="step",
                    desc=self._stage or None,
                )
        if "val_loss" in row:
            self._eval(row["step"], row["val_loss"], row.get("val_losses", {}), row.get("val_measures", {}))
        elif "scores" in row:
            self._scores(row["step"], row["scores"])
        elif row["step"] > self._last_step:
            self._step(row)

    def _size(self) -> str:
        """Words for tokens of a step, and of all."""
        steps, tokens = self.total_steps, self._num_before(self.total_steps) * self._tokens_each
        first, last = (self._tokens_each * (self._num_before(at) - self._num_before(at - 1)) for at in (1, steps))
        sizes = f"{last:,}" if first == last else f"{first:,} to {last:,}"
        return f" of {sizes} tokens, {tokens:,} in all" if tokens else ""

    def close(self) -> None:
        """Finish the bar. Harmless when repeated."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _step(self, row: dict[str, Any]) -> None:
        self._recent.append(row)
        now_s, step = self._clock_s(), row["step"]
        if self._bar is not None:
            ends = f"  all in {self._eta_of_all()}" if self._tokens_after else ""
            self._bar.set_postfix_str(self._numbers() + ends, refresh=False)
            self._bar.update(step - self._last_step)
        elif now_s - self._shown_s >= PLAIN_LINE_EVERY_S or step == self.total_steps:
            self._shown_s = now_s
            of_all = f", of all stages {self._eta_of_all()}" if self._tokens_after else ""
            self._print(f"{self._at(step)}  {self._numbers()}  eta {self._eta()}{of_all}")
        self._last_step = step

    def _eval(
        self, step: int, loss: float | None, by_source: Mapping[str, float | None], measures: Mapping[str, float]
    ) -> None:
        if step > self._last_eval and (loss is not None or measures):
            self._last_eval = step
            told = "" if loss is None else f"  val loss {loss:.4f}"
            if not measures and loss is not None:
                told += f"  perplexity {math.exp(min(loss, 700.0)):.1f}"
            told += "".join(f"  val {name.replace('_', ' ')} {value:.3f}" for name, value in measures.items())
            told += "".join(f"  {name} {math.nan if own is None else own:.4f}" for name, own in by_source.items())
            self._print(f"{self._at(step)}{told}")

    def _at(self, step: int) -> str:
        """Words for where the run is, such as `stage 2 of 4, anneal: step 7/40`."""
        return f"{self._stage}: step {step}/{self.total_steps}" if self._stage else f"step {step}/{self.total_steps}"

    def _scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if step > self._last_scores:
            self._last_scores = step
            for score in of_rows(rows):
                self._print(f"{self._at(step)}  {score.sentence}")

    def _numbers(self) -> str:
        """The last step's, and the throughput of the last 20. A number that was not finite shows as nan."""
        last = {key: math.nan if value is None else value for key, value in self._recent[-1].items()}
        text = (
            f"loss {last['loss']:.3f}  grad {last['grad_norm']:.2f}  lr {main_lr(last):.1e}  tok/s {self._rate():,.0f}"
            f"  maxvio {last['max_vio']:.2f}"
        )
        told: Mapping[str, float] = self._recent[-1].get("measures", {})
        text += "".join(f"  {name} {told[name]:.2f}" for name in SHOWN if told.get(name) is not None)
        if "global_batch_size" in last:
            text += f"  batch {last['global_batch_size']}"
        if "mfu" in last:
            text += f"  mfu {100 * last['mfu']:.1f} %"
        return text + (f"  skipped {last['skipped']}" if last["skipped"] else "")

    def _rate(self) -> float:
        """Tokens per second of the last steps."""
        return sum(r["tokens"] for r in self._recent) / max(sum(r["seconds"] for r in self._recent), 1e-9)

    def _left_s(self) -> float:
        seconds, before = sum(r["seconds"] for r in self._recent), self._num_before
        first, last = self._recent[0]["step"], self._recent[-1]["step"]
        left = before(self.total_steps) - before(last)
        return float(seconds / (before(last) - before(first - 1)) * left)

    def _eta(self) -> str:
        return _interval(self._left_s())

    def _eta_of_all(self) -> str:
        return _interval(self._left_s() + self._tokens_after / max(self._rate(), 1e-9))

    def _print(self, line: str) -> None:
        tqdm.write(line, file=self._screen)  # above the bar, if there is one
        self._screen.flush()


def _interval(seconds: float) -> str:
    return tqdm.format_interval(round(seconds)).removeprefix("0")


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
