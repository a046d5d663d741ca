"""Rotary position embedding: tables of cosines and sines for every scaling rule.

The rules are those of Hugging Face's `modeling_rope_utils.py`, computed in float64 and rounded once.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.spec import ModelSpec, RopeScaling

__all__ = ["cos_sin_table"]

Floats = NDArray[np.float64]


def cos_sin_table(spec: ModelSpec, positions: int) -> NDArray[np.float32]:
    """[positions, head_dim]: head_dim / 2 cosines, then as many sines.

    `dynamic` NTK scaling follows a rule per position: position p is rotated with the base that belongs
    to a sequence of length max(p + 1, original length). This equals Hugging Face's result as long as the
    sequence fits the original length; beyond it theirs depends on the length of the call that happened to
    compute a key, so that a prompt in one piece and the same prompt token by token differ. Here a key
    depends on its position alone.
    """
    steps = np.arange(positions, dtype=np.float64)[:, None]
    angles = steps * _frequencies(spec, steps)
    factor = _attention_factor(spec.rope_scaling)
    return np.hstack((np.cos(angles) * factor, np.sin(angles) * factor)).astype(np.float32)


def _frequencies(spec: ModelSpec, positions: Floats) -> Floats:
    """Radians per position of each rotated pair, [head_dim / 2] or [positions, head_dim / 2]."""
    dim, base, rule = spec.head_dim, spec.rope_theta, spec.rope_scaling
    divisors = 1.0 if spec.rope_factors is None else np.array(spec.rope_factors)
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    plain = np.power(base, -exponents) / divisors
    if rule is None:
        return plain
    if rule.type == "linear":
        return plain / rule.factor
    if rule.type == "dynamic":
        length = np.maximum(positions + 1, rule.original_max_position)
        growth = rule.factor * length / rule.original_max_position - (rule.factor - 1)
        stretched: Floats = np.power(base * growth ** (dim / (dim - 2)), -exponents) / divisors
        return stretched
    return _llama3(plain, rule) if rule.type == "llama3" else _yarn(plain, dim, base, rule)


def _llama3(frequencies: Floats, rule: RopeScaling) -> Floats:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = rule.original_max_position * frequencies / (2 * math.pi)
    smooth = (turns - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * ((1 - smooth) / rule.factor + smooth)


def _yarn(frequencies: Floats, dim: int, base: float, rule: RopeScaling) -> Floats:
    """https://arxiv.org/abs/2309.00071: a ramp over the pairs from keeping to stretching."""

    def pair_of(rotations: float) -> float:
        return dim * math.log(rule.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(rule.beta_fast), pair_of(rule.beta_slow)
    if rule.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return frequencies * (ramp / rule.factor + (1 - ramp))


def _attention_factor(rule: RopeScaling | None) -> float:
    """YaRN's temperature of the attention, folded into both q and k through the table."""
    if rule is None or rule.type != "yarn":
        return 1.0
    if rule.attention_factor is not None:
        return rule.attention_factor
    if rule.mscale and rule.mscale_all_dim:
        return _mscale(rule.factor, rule.mscale) / _mscale(rule.factor, rule.mscale_all_dim)
    return _mscale(rule.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
