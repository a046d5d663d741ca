"""The int8 KV cache in numpy, from its definition in `_fast/cpu/attention.h`."""

import numpy as np


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (int8, as x) and scales (float32, x without its last axis) of float32 rows."""
    x = x.astype(np.float32)
    peak = np.abs(x).max(-1)
    finite, zero = np.isfinite(peak), peak < 2.0**-120
    usable = finite & ~zero
    inverse = np.where(usable, np.float32(127) / np.where(usable, peak, 1), 0).astype(np.float32)
    codes = np.rint(np.where(usable[..., None], x, 0) * inverse[..., None]).astype(np.int8)
    return codes, np.where(finite, np.where(zero, 0, peak / np.float32(127)), np.nan).astype(np.float32)


def blocks_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[blocks, bytes] of codes [blocks, Hk, block, D] and scales [blocks, Hk, block]."""

    def padded(part: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)
        return np.pad(values, ((0, 0), (0, -values.shape[1] % 64)))

    return np.concatenate([padded(codes), padded(scales)], axis=1)
