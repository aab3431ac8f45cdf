"""Pictures of a training run: the loss, the reward, how evenly the experts are used, and all of it over all stages.

Legend: S recorded steps, N sources of data, R runs, L layers with experts, E experts.
Decisions: figures are built without pyplot, so nothing global changes and no display is needed; matplotlib is imported
only when a picture is drawn. Light colours for single steps, strong ones for what to look at.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trinity.errors import DataError
from trinity.observability.run_history import METRICS, StageSpan, read_stages
from trinity.observability.train_log import main_lr, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, DARK = "#2b6cb0", "#dd6b20", "#a0aec0", "#2d3748"


def loss_curve_png(metrics_jsonl: str | Path, path: str | Path) -> Path:
    """Draw training loss (each step and smoothed), validation loss and learning rate; -> `path`. Raises DataError when
    the log holds no step."""
    rows = read_rows(metrics_jsonl)
    steps = [row for row in rows if row.get("loss") is not None]
    if not steps:
        raise DataError(f"{metrics_jsonl} holds no training step; train first or name another metrics.jsonl")
    figure = _figure(9, 5)
    above, below = figure.subplots(2, 1, height_ratios=[6, 1], sharex=True)
    _draw_losses(above, steps, [row for row in rows if row.get("val_loss") is not None])
    below.plot([row["step"] for row in steps], [main_lr(row) for row in steps], color=DARK, linewidth=1)
    below.set_ylim(bottom=0)
    below.set_ylabel("LR")
    below.set_xlabel("step")
    return _saved(figure, path)


def _draw_losses(axes: "Axes", steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    at = np.array([row["step"] for row in steps])
    loss = np.array([row["loss"] for row in steps])
    smooth = _smoothed(loss, max(1, len(loss) // 50))
    axes.plot(at, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(at, smooth, color=BLUE, linewidth=1.8, label=f"training, at the end {smooth[-1]:.2f}")
    if evals:
        label = f"validation, at the end {evals[-1]['val_loss']:.2f}"
        values = [row["val_loss"] for row in evals]
        axes.plot([row["step"] for row in evals], values, "o-", color=ORANGE, markersize=5, linewidth=1, label=label)
    lowest = [float(smooth.min()), *(row["val_loss"] for row in evals)]
    low, high = min(lowest), float(np.quantile(loss, 0.995))
    margin = 0.06 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper right")


def reward_curves_png(rewards_RS: np.ndarray, path: str | Path) -> Path:
    """Draw the mean reward of each step of R runs, and their mean; -> `path`."""
    figure = _figure(5.2, 2.5)
    axes, steps = figure.subplots(), np.arange(1, rewards_RS.shape[1] + 1)
    for rewards_S in rewards_RS:
        axes.plot(steps, rewards_S, color=BLUE, alpha=0.3, linewidth=0.8)
    mean_S = _smoothed(rewards_RS.mean(0), 5)
    label = f"mean of {len(rewards_RS)} seeds, from {mean_S[0]:.2f} to {mean_S[-1]:.2f}"
    axes.plot(steps, mean_S, color=BLUE, linewidth=1.8, label=label)
    axes.set_ylim(0, 1)
    axes.set_xlabel("policy step")
    axes.set_ylabel("mean reward")
    axes.legend(frameon=False, loc="lower right")
    return _saved(figure, path)


def run_png(root: str | Path, path: str | Path) -> Path:
    """Draw a run in `root` over all of its stages: loss, heterogeneity of its batches, what its tokens were from and how its
    experts were used, so far as its logs say; -> `path`. Raises DataError when they hold no step."""
    spans = read_stages(Path(root))
    rows = [{**row, "step": span.first + row["step"]} for span in spans for row in read_rows(span.folder / METRICS)]
    steps = [row for row in rows if row.get("loss") is not None]
    if not steps:
        raise DataError(f"the logs in {root} hold no training step; train first or name another folder")
    drawn: list[tuple[float, Callable[[Axes], None]]] = [
        (4.5, lambda axes: _draw_losses(axes, steps, [row for row in rows if row.get("val_loss") is not None]))
    ]
    if any(row.get("batch_het") is not None for row in steps):
        drawn.append((1.8, lambda axes: _draw_batch_het(axes, steps)))
    if any(row.get("source_tokens") for row in steps):
        drawn.append((1.8, lambda axes: _draw_sources(axes, steps)))
    if loads := [(span.first + row["step"], row["counts_LE"]) for span in spans for row in _loads(span.folder)]:
        drawn.append((2.2, lambda axes: _draw_load(axes, loads)))
    heights = [height for height, _ in drawn]
    figure = _figure(10, 0.6 + sum(heights))
    parts = np.atleast_1d(figure.subplots(len(drawn), 1, height_ratios=heights, sharex=True))
    for axes, (_, draw) in zip(parts, drawn, strict=True):
        draw(axes)
        _mark_stages(axes, [span for span in spans if span.first < steps[-1]["step"]], is_named=axes is parts[0])
    parts[-1].set_xlim(0, max(2, steps[-1]["step"]))
    parts[-1].set_xlabel("step")
    return _saved(figure, path)


def _mark_stages(axes: "Axes", spans: Sequence[StageSpan], is_named: bool) -> None:
    """A line where each stage begins, with its name."""
    for span in spans:
        if span.number > 1:
            axes.axvline(span.first, color=DARK, linewidth=0.8, linestyle=":")
        if is_named and span.is_one_of_many:
            axes.text(span.first, 0.02, f" {span.name}", transform=axes.get_xaxis_transform(), fontsize=9, color=DARK)


def _draw_batch_het(axes: "Axes", steps: list[dict[str, Any]]) -> None:
    here = [(row["step"], row["batch_het"]) for row in steps if row.get("batch_het") is not None]
    at, value = np.array(here).T
    axes.plot(at, value, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(at, _smoothed(value, max(1, len(value) // 50)), color=BLUE, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("BatchHet, nats")


def _draw_sources(axes: "Axes", steps: list[dict[str, Any]]) -> None:
    """Shares of the sources in each step; a step that says nothing of them has none."""
    names = list(dict.fromkeys(name for row in steps for name in row.get("source_tokens") or {}))
    tokens_NS = np.array([[(row.get("source_tokens") or {}).get(name, 0) for row in steps] for name in names], float)
    smooth_NS = np.array([_smoothed(tokens_S, max(1, len(steps) // 50)) for tokens_S in tokens_NS])
    total_S = smooth_NS.sum(0)
    share_NS = np.divide(smooth_NS, total_S, out=np.zeros_like(smooth_NS), where=total_S > 0)
    axes.stackplot([row["step"] for row in steps], share_NS, labels=[_label(name) for name in names])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of tokens")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _label(name: str) -> str:
    """A name as it is: without formulas, and shown even if it begins with a line."""
    return name[:40].replace("$", r"\$").removeprefix("_")


def _draw_load(axes: "Axes", loads: list[tuple[int, Any]]) -> None:
    """Loads of all experts of all layers, from the least to the most loaded."""
    at = [step for step, _ in loads]
    load_SX = np.array([_relative(np.array(counts_LE, float)).ravel() for _, counts_LE in loads])
    low, tenth, middle, ninth, high = np.quantile(load_SX, [0, 0.1, 0.5, 0.9, 1], axis=1)
    axes.fill_between(at, low, high, color=GREY, alpha=0.3, linewidth=0, label="all experts")
    axes.fill_between(at, tenth, ninth, color=BLUE, alpha=0.4, linewidth=0, label="8 of 10")
    axes.plot(at, middle, color=BLUE, linewidth=1.4, label="median")
    axes.axhline(1.0, color=DARK, linewidth=0.7, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rows / mean of the layer")
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=8)


def _loads(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "expert_load.jsonl") if row.get("counts_LE")]


def expert_load_png(history: str | Path | np.ndarray, path: str | Path) -> Path:
    """Draw the share of rows of each expert relative to the mean of its layer, over the last tenth of the run, and
    below it MaxVio = max / mean - 1 of each layer over time; -> `path`.

    `history` is an expert_load.jsonl or counts_SLE with one record per step. Raises DataError when it is empty.
    """
    steps, counts_SLE = _load_history(history)
    last = max(1, len(steps) // 10)
    load_LE = _relative(counts_SLE[-last:].sum(0))
    num_layers, num_experts = load_LE.shape
    figure = _figure(max(9, min(18, 0.08 * num_experts)), 4.2 + max(1.6, min(8, 0.35 * num_layers)))
    above, below = figure.subplots(2, 1, height_ratios=[max(1.6, min(8, 0.35 * num_layers)), 2.2])
    _draw_heat(figure, above, load_LE, f"steps {steps[-last]} to {steps[-1]}")
    _draw_violation(below, steps, _relative(counts_SLE).max(-1) - 1)
    return _saved(figure, path)


def _draw_heat(figure: "Figure", axes: "Axes", load_LE: np.ndarray, when: str) -> None:
    from matplotlib.colors import TwoSlopeNorm

    num_layers, num_experts = load_LE.shape
    top = min(4.0, max(2.0, float(load_LE.max())))
    norm = TwoSlopeNorm(1.0, 0.0, top)
    image = axes.imshow(load_LE, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    extend = "max" if load_LE.max() > top else "neither"
    figure.colorbar(image, ax=axes, label="rows / mean of the layer", pad=0.01, extend=extend)
    axes.set_title(f"Load of the experts, {when}", loc="left", fontweight="bold")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer with experts")
    axes.locator_params(integer=True)
    axes.spines[:].set_visible(False)
    if num_experts <= 16 and num_layers <= 16:
        for (layer, expert), value in np.ndenumerate(load_LE):
            colour = "white" if value > 1 + 0.7 * (top - 1) or value < 0.3 else DARK
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _draw_violation(axes: "Axes", steps: np.ndarray, violation_SL: np.ndarray) -> None:
    axes.plot(steps, violation_SL, color=GREY, alpha=0.5, linewidth=0.7)
    axes.plot([], [], color=GREY, label="one layer")
    axes.plot(steps, violation_SL.max(1), color=ORANGE, linewidth=1.6, label="worst layer")
    axes.plot(steps, violation_SL.mean(1), color=BLUE, linewidth=1.6, label="mean of the layers")
    axes.axhline(1.0, color=DARK, linewidth=0.7, linestyle=":")
    axes.set_ylim(0, max(1.2, 1.08 * float(violation_SL.max())))
    axes.set_xlabel("step")
    axes.set_ylabel("MaxVio (0: even; ideal < 1)")
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=9)


def _load_history(history: str | Path | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> step numbers [S], counts_SLE."""
    if isinstance(history, np.ndarray):
        steps, counts_SLE = np.arange(1, len(history) + 1), history
    else:
        rows = read_rows(history)
        steps, counts_SLE = np.array([row["step"] for row in rows]), np.array([row["counts_LE"] for row in rows])
    if counts_SLE.size == 0:
        raise DataError(f"{'the history' if history is counts_SLE else history} holds no expert loads; train first")
    return steps, counts_SLE.astype(np.float64)


def _relative(counts: np.ndarray) -> np.ndarray:
    """Counts [..., E] over their mean; an unused layer counts as even."""
    mean = counts.mean(-1, keepdims=True)
    return np.divide(counts, mean, out=np.ones_like(counts), where=mean > 0)


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of about `width` values around each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    starts, ends = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _saved(figure: "Figure", path: str | Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target
