"""Quantized linears by the definitions of AWQ, GPTQ and compressed-tensors: random codes, their stored
tensors, and the weights that they stand for."""

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LAYOUTS = ["awq", "gptq", "compressed-tensors"]


def words(numbers, bits, axis, order=None):
    """Runs of 32 / bits numbers along `axis` as int32; the i-th lowest bits of a word are number order[i]."""
    run = 32 // bits
    numbers = np.moveaxis(numbers, axis, -1)
    padding = [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % run)]
    runs = np.pad(numbers, padding).reshape(*numbers.shape[:-1], -1, run).astype(np.uint64)
    total = np.zeros(runs.shape[:-1], np.uint64)
    for place, index in enumerate(order or range(run)):
        total |= runs[..., index] << np.uint64(bits * place)
    return np.ascontiguousarray(np.moveaxis(total.astype(np.uint32).view(np.int32), -1, axis))


def as_bfloat16(x):
    """The nearest values towards zero, and their patterns."""
    patterns = (np.float32(x).view(np.uint32) >> 16).astype(np.uint16)
    return (patterns.astype(np.uint32) << 16).view(np.float32), patterns


class Coded:
    """A weight [n, k] in groups of `group` columns, one for all of them if that is -1."""

    def __init__(self, n, k, group, *, bits=4, symmetric=False, index=None, seed=0, scale=0.02):
        rng = np.random.default_rng([n, k, bits, seed])
        self.n, self.k, self.bits, self.group = n, k, bits, k if group == -1 else group
        groups = -(-k // self.group)
        self.q = rng.integers(0, 1 << bits, (n, k))
        self.zero = np.full((n, groups), 1 << (bits - 1))
        if not symmetric:
            # In v1 of GPTQ there is no zero point 0.
            self.zero = rng.integers(1, 1 << bits, (n, groups))
        self.scale = (rng.uniform(0.5, 1.5, (n, groups)) * scale * 16 / (1 << bits)).astype(np.float16)
        self.index = np.arange(k) // self.group if index is None else index
        self.symmetric = symmetric

    @property
    def weight(self):
        """float64 [n, k]"""
        scale = self.scale.astype(np.float64)[:, self.index]
        return (self.q - self.zero[:, self.index]) * scale

    @property
    def rounded_weight(self):
        """float64 [n, k], with the product of scale and zero point in half precision."""
        minimum = (-self.zero * self.scale.astype(np.float64)).astype(np.float16).astype(np.float64)
        return self.q * self.scale.astype(np.float64)[:, self.index] + minimum[:, self.index]

    def bfloat16_scales(self):
        self.scale, self.patterns = as_bfloat16(self.scale.astype(np.float32))
        return self

    def stored(self, layout, shift=1):
        """Tensors by the last part of their name; `shift`: what GPTQ's v1 takes off zero points."""
        if layout == "compressed-tensors":
            found = {
                "weight_packed": words(self.q, self.bits, 1),
                "weight_scale": self.scale,
                "weight_shape": np.array([self.n, self.k]),
            }
            if not self.symmetric:
                found["weight_zero_point"] = words(self.zero, self.bits, 0)
            return found
        scales = np.ascontiguousarray(self.scale.T)
        if layout == "awq":
            return {
                "qweight": words(self.q.T, 4, 1, AWQ_ORDER),
                "qzeros": words(self.zero.T, 4, 1, AWQ_ORDER),
                "scales": scales,
            }
        return {
            "qweight": words(self.q.T, self.bits, 0),
            "qzeros": words((self.zero.T - shift) % (1 << self.bits), self.bits, 1),
            "scales": scales,
            "g_idx": self.index.astype(np.int32),
        }
