"""Loads of experts for `trinity bench placement`: a synthetic one that drifts, and those from files.

Legend: W windows, L layers, E experts.
The drift, stated in full: the log-load of each expert is sigma_L * g, where g is a standard normal AR(1) process between
windows, g' = rho * g + sqrt(1 - rho^2) * noise, all experts independent. sigma is chosen per layer so that the hottest
expert of the first window has between 5 and 14 times the mean, evenly over layers, as is told of DeepSeek-V3. rho is how much
of an expert's log-load stays from one window to the next; no published figure is known to us, so several are measured.
"""

import json
from pathlib import Path

import numpy as np

from trinity.errors import DataError

HOTTEST = (5.0, 14.0)  # over the mean expert of its layer


def drifting(num_windows: int, num_layers: int, num_experts: int, rho: float, seed: int = 0) -> np.ndarray:
    """float64 [W, L, E], rows per window; each layer's mean expert has 1000."""
    rng = np.random.default_rng(seed)
    g_LE = rng.standard_normal((num_layers, num_experts))
    sigma_L1 = _sigma(g_LE, rng.uniform(*HOTTEST, num_layers))[:, None]
    found = []
    for _ in range(num_windows):
        load_LE = np.exp(sigma_L1 * g_LE)
        found.append(1000 * load_LE / load_LE.mean(1, keepdims=True))
        g_LE = rho * g_LE + np.sqrt(1 - rho**2) * rng.standard_normal(g_LE.shape)
    return np.array(found)


def _sigma(g_LE: np.ndarray, wanted_L: np.ndarray) -> np.ndarray:
    """Find by bisection: with it, max over mean of exp(sigma * g) is as wanted, or as near as so many experts allow."""
    low_L, high_L, sigma_L = np.zeros(len(g_LE)), np.full(len(g_LE), 8.0), np.empty(len(g_LE))
    for _ in range(40):
        sigma_L = (low_L + high_L) / 2
        load_LE = np.exp(sigma_L[:, None] * (g_LE - g_LE.max(1, keepdims=True)))
        above_L = 1 / load_LE.mean(1) > wanted_L
        low_L, high_L = np.where(above_L, low_L, sigma_L), np.where(above_L, sigma_L, high_L)
    return sigma_L


def read(path: str) -> np.ndarray:
    """float64 [W, L, E] from counts in a .npy or .json file, [L, E] or [W, L, E]. Raises DataError."""
    if not Path(path).is_file():
        raise DataError(f"load file {path} does not exist; give a .npy or .json file of counts, [L, E] or [W, L, E]")
    try:
        counts = (
            np.load(path, allow_pickle=False) if path.endswith(".npy") else np.array(json.loads(Path(path).read_text()))
        )
        load = counts.astype(np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"load file {path} holds no numbers of equal layers ({error}); write counts [L, E] or [W, L, E]"
        ) from None
    if load.ndim not in (2, 3) or not load.size:
        raise DataError(f"load file {path} has shape {load.shape}; use [L, E] or [W, L, E], none of them 0")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise DataError(f"load file {path} holds counts that are negative or not finite; use numbers from 0")
    return load if load.ndim == 3 else load[None]
