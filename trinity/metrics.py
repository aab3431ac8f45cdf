"""What is measured: the log of a training run, and the names of all that the servers export.

Legend: L layers with experts, E experts.

Decisions.
- A run writes metrics.jsonl (one object a line: a step, or a validation), expert_load.jsonl (rows per expert, at most
  about 200 times in a run) and TensorBoard events. A number that is not finite is null.
- The first step that is logged says where a run resumes: lines from there on are dropped, so each step is there once,
  whatever was written between the last checkpoint and a crash. A line torn by the crash is dropped too.
- Prometheus metrics are declared here as values and exported at the edges: one list for code, docs and dashboards.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

LOADS_PER_RUN = 200


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all workers. Losses in nats per token; `skipped` counts the steps skipped so far."""

    step: int
    loss: float
    z_loss: float
    balance_loss: float
    grad_norm: float
    muon_lr: float
    adamw_lr: float
    tokens: int
    seconds: float
    max_vio: float
    skipped: int = 0
    counts_LE: Sequence[Sequence[int]] | None = None


class TrainLog:
    """The log of one run, written by one process. Steps count from 1 and come in order; call `close` at the end.

    Nothing is written before the first step. What a person sees of it is trinity/progress.py's.
    """

    def __init__(self, out_dir: str | Path, total_steps: int):
        self.out_dir, self.total_steps = Path(out_dir), total_steps
        self._files: _Files | None = None

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        files = self._opened(metrics.step, is_validation=False)
        row = asdict(metrics)
        counts_LE = row.pop("counts_LE")
        files.write_row(row)
        every = max(1, self.total_steps // LOADS_PER_RUN)
        if counts_LE and (metrics.step % every == 0 or metrics.step == self.total_steps):
            files.write_load({"step": metrics.step, "counts_LE": counts_LE})

    def catch_up(self, metrics: StepMetrics) -> None:
        """Record the step that a run goes on from, if whoever took it died before it was logged."""
        rows = read_rows(self.out_dir / "metrics.jsonl")
        if not any(row["step"] == metrics.step and "loss" in row for row in rows):
            self.step(metrics)

    def validation(self, step: int, loss: float) -> None:
        """Record the validation loss of the weights after `step`."""
        self._opened(step, is_validation=True).write_row({"step": step, "val_loss": loss})

    def close(self) -> None:
        """Finish the files. Harmless when repeated."""
        if self._files is not None:
            self._files.close()
        self._files = None

    def _opened(self, step: int, is_validation: bool) -> "_Files":
        if self._files is None:
            self._files = _Files(self.out_dir, step, is_validation)
        return self._files


class _Files:
    """The three files of a run, cut to what lies before `first_step` (or before its validation) and open for appending."""

    def __init__(self, out_dir: Path, first_step: int, is_validation: bool):
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, for training only

        out_dir.mkdir(parents=True, exist_ok=True)
        self._rows = _cut(out_dir / "metrics.jsonl", first_step, is_validation)
        self._loads = _cut(out_dir / "expert_load.jsonl", first_step, is_validation)
        self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=first_step + is_validation)

    def write_row(self, row: dict[str, Any]) -> None:
        self._rows.write(json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._rows.flush()
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar("val/loss" if key == "val_loss" else f"train/{key}", value, row["step"])

    def write_load(self, row: dict[str, Any]) -> None:
        self._loads.write(json.dumps(row) + "\n")
        self._loads.flush()

    def close(self) -> None:
        for file in (self._rows, self._loads, self._board):
            file.close()


def read_rows(file: str | Path) -> list[dict[str, Any]]:
    """The objects of a log's lines, in order; [] without the file. A torn line (a crash while writing) is left out."""
    path = Path(file)
    return [row for line in path.read_text("utf-8").splitlines() if (row := parse_row(line))] if path.is_file() else []


def parse_row(line: str) -> dict[str, Any] | None:
    """A row of a log, or None for a torn line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _cut(path: Path, first_step: int, is_validation: bool = False) -> TextIO:
    """Keep the rows before `first_step` (or before its validation), replacing the file in one move; open it for appending."""
    first = first_step, is_validation
    kept = [row for row in read_rows(path) if (row["step"], "val_loss" in row) < first]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    os.replace(scratch, path)
    return path.open("a", encoding="utf-8")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Metric:
    """The declaration of one Prometheus metric; `buckets` are a histogram's upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

SERVING_METRICS = (
    Metric("trinity_requests_total", "counter", "Requests answered, by route and status code.", ("route", "code")),
    Metric("trinity_requests_running", "gauge", "Sequences in the running batch."),
    Metric("trinity_requests_waiting", "gauge", "Sequences waiting to be scheduled."),
    Metric("trinity_prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
    Metric("trinity_generated_tokens_total", "counter", "Tokens generated."),
    Metric("trinity_time_to_first_token_seconds", "histogram", "From request to first token.", buckets=LONG_S),
    Metric("trinity_inter_token_seconds", "histogram", "Between two tokens of a request.", buckets=SHORT_S),
    Metric("trinity_request_seconds", "histogram", "From request to last token.", ("route",), LONG_S),
    Metric("trinity_kv_blocks_free", "gauge", "Blocks of the KV cache that no sequence holds."),
    Metric("trinity_kv_blocks", "gauge", "Blocks of the KV cache."),
    Metric("trinity_preemptions_total", "counter", "Sequences that gave their blocks back and were computed again."),
    Metric("trinity_weights_version", "gauge", "Optimizer step of the weights in use."),
    Metric("trinity_weights_versions_held", "gauge", "Versions that engines hold for pinned requests."),
    Metric("trinity_weights_quarantined_total", "counter", "Versions that gave logits which are not finite."),
    Metric("trinity_weights_switch_seconds", "gauge", "Seconds that it took to take up the version in use."),
    Metric("trinity_passes_repeated_total", "counter", "Passes of requests repeated for want of good weights."),
)

# Of one engine: EngineStats.dispatch_seconds is {phase: (counts, sum)}, with a count for each of these buckets and one more for
# what is longer, not cumulative; EngineStats.num_dispatch_retries. Both since the engine began.
DISPATCH_PHASES = ("route", "send", "wait", "combine")
DISPATCH_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
DISPATCH_SECONDS = Metric(
    "trinity_dispatch_seconds", "histogram", "Of one layer's rows, by phase.", ("phase",), DISPATCH_S
)
DISPATCH_METRICS = (
    DISPATCH_SECONDS,
    Metric("trinity_dispatch_retries_total", "counter", "Rows sent again, to another replica or a restarted shard."),
)

# Of the pool, by its placement service; while that is away, `up` is 0 and the others stay as they were.
PLACEMENT_METRICS = (
    Metric("trinity_placement_up", "gauge", "1 while the placement service answers."),
    Metric("trinity_placement_epoch", "gauge", "Epoch of the placement table."),
    Metric("trinity_placement_imbalance", "gauge", "Largest / mean rows per second of the shards; 1 is even."),
    Metric("trinity_placement_replicas", "gauge", "Replicas of all experts."),
    Metric("trinity_placement_max_replicas", "gauge", "Replicas of the expert that has most."),
    Metric("trinity_placement_shards", "gauge", "Shards, by what they are doing.", ("state",)),
    Metric("trinity_placement_changes_total", "counter", "Changes of the table that have ended.", ("result",)),
    Metric("trinity_placement_copies_total", "counter", "Replicas that those changes copied."),
    Metric("trinity_placement_copied_bytes_total", "counter", "Bytes that those changes copied."),
    Metric("trinity_placement_recoveries_total", "counter", "Shards lost and replaced."),
    Metric("trinity_placement_change_seconds", "gauge", "Seconds that the latest change took, or has taken so far."),
    Metric("trinity_shard_rows_per_second", "gauge", "Rows that the shard computes.", ("shard",)),
    Metric("trinity_shard_weight_bytes", "gauge", "Bytes of its weights.", ("shard",)),
)
ALL_METRICS = SERVING_METRICS + DISPATCH_METRICS + PLACEMENT_METRICS
