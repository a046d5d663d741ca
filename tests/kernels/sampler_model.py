"""The sampler's definition (`_fast/cpu/sample.h`, and `slot_params.py` for masks and bias) in float64."""

import math
from typing import Any

import numpy as np

from ..noise import gumbel


def ranked(y: np.ndarray) -> list[int]:
    return np.lexsort((np.arange(len(y)), -y)).tolist()


def shaped(x: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    """Logits before the temperature. `row` has the sampling parameters, and ids or vectors for the rest."""
    y = x.astype(np.float64)
    counts = row.get("counts", np.zeros(len(x), np.int32))
    seen = counts > 0
    seen[list(row.get("prompt", ()))] = True
    y = np.where(seen, np.where(y > 0, y / row.get("repetition", 1.0), y * row.get("repetition", 1.0)), y)
    y = y - row.get("frequency", 0.0) * counts - row.get("presence", 0.0) * (counts > 0)
    y = y + row.get("bias", 0.0)
    if "allowed" in row:
        kept = np.full(len(y), -np.inf)
        kept[row["allowed"]] = y[row["allowed"]]
        y = kept
    if row.get("position", 0) < row.get("min_len", 0):
        y[list(row.get("banned", ()))] = -np.inf
    return y


def scores(x: np.ndarray, row: dict[str, Any]) -> dict[int, float]:
    """What may be drawn, with its score; the largest is drawn. Empty: the row fails."""
    if np.isnan(x).any() or not np.isfinite(x.max()):
        return {}
    y = shaped(x, row)
    order = [i for i in ranked(y) if y[i] > -np.inf]
    temperature = row.get("temperature", 0.0)
    if temperature < 1e-5:
        return {i: float(y[i]) for i in order}
    y = y / temperature
    if row.get("top_k", 0) > 0:
        order = order[: row["top_k"]]
    if not order:
        return {}
    weight = np.exp(y - y[order[0]])
    if row.get("top_p", 1.0) < 1.0:
        mass = np.cumsum(weight[order])
        order = order[: int(np.searchsorted(mass, row["top_p"] * mass[-1])) + 1]
    order = [i for i in order if weight[i] >= row.get("min_p", 0.0)]
    return {i: float(y[i]) + gumbel(row["seed"], row["position"], i) for i in order}


def drawn(x: np.ndarray, row: dict[str, Any]) -> tuple[int, float]:
    """The token, -1 if the row fails, and the gap to the second best score."""
    found = scores(x, row)
    if not found:
        return -1, math.inf
    order = sorted(found, key=lambda i: (-found[i], i))
    return order[0], found[order[0]] - found[order[1]] if len(order) > 1 else math.inf


def log_probabilities(x: np.ndarray) -> np.ndarray:
    exact = x.astype(np.float64)
    return exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())
