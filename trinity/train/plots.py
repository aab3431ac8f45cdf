"""Pictures of a training run: the loss, the reward, and how evenly the experts are used.

Legend: S recorded steps, R runs, L layers with experts, E experts.
Decisions: figures are built without pyplot, so nothing global changes and no display is needed; matplotlib is imported
only when a picture is drawn. Light colours for single steps, strong ones for what to look at.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trinity.errors import DataError
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
