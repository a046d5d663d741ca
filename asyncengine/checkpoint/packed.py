"""Safetensors whose linears are codes, scales and zero points: each of them shown as one weight."""

from collections.abc import Collection
from typing import NamedTuple, NoReturn

import numpy as np

from ..errors import ModelLoadError
from .safetensors import SafetensorsCheckpoint
from .spec import WeightPacking
from .tensor import Coding, TensorView

__all__ = ["PackedCheckpoint"]

_SCALES = ("F16", "BF16", "F32")
_MOST_HALF = 65504.0


class _Parts(NamedTuple):
    """Names of what stands in place of a `weight`."""

    codes: str
    scales: str
    zeros: str
    group_index: str
    shape: str | None = None


_GPTQ = _Parts("qweight", "scales", "qzeros", "g_idx")
_PARTS = {
    "awq": _GPTQ,
    "gptq": _GPTQ,
    "compressed-tensors": _Parts(
        "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
    ),
}


class PackedCheckpoint:
    """A `Checkpoint` over one that is quantized as `packing` says; it closes that one.

    A module with codes has a `weight` of type CODES; others are as they are stored. Refuses scales whose
    product with the largest code half precision does not hold.
    """

    def __init__(self, stored: SafetensorsCheckpoint, packing: WeightPacking) -> None:
        self._stored = stored
        self._packing = packing
        self._parts = _PARTS[packing.method]
        self._views: dict[str, TensorView] = {}
        held = stored.names()
        ending = f".{self._parts.codes}"
        self._modules = {name.removesuffix(ending) for name in held if name.endswith(ending)}
        for module in self._modules:
            if f"{module}.weight" in held:
                self._fail(f"holds {module}.weight and {module}{ending}; it must be one of them")

    @property
    def total_bytes(self) -> int:
        return self._stored.total_bytes

    def names(self) -> Collection[str]:
        named: dict[str, None] = {}
        for name in self._stored.names():
            module, _, part = name.rpartition(".")
            named[f"{module}.weight" if part in self._parts and module in self._modules else name] = None
        return named.keys()

    def tensor(self, name: str) -> TensorView:
        module = name.removesuffix(".weight")
        if module == name or module not in self._modules:
            return self._stored.tensor(name)
        if name not in self._views:
            self._views[name] = self._read(module)
        return self._views[name]

    def close(self) -> None:
        self._views = {}
        self._stored.close()

    def _read(self, module: str) -> TensorView:
        packing, parts = self._packing, self._parts
        run = 32 // packing.bits
        codes = self._part(module, parts.codes, ("I32",))
        if len(codes.shape) != 2:
            self._fail(f"holds {codes.name} of shape {list(codes.shape)}; it must have two dimensions")
        if packing.method == "awq":
            cols, rows = codes.shape[0], codes.shape[1] * run
        elif packing.method == "gptq":
            cols, rows = codes.shape[0] * run, codes.shape[1]
        else:
            rows, cols = self._shape(module)
            self._check(codes, (rows, -(-cols // run)))
        group = cols if packing.group_size == -1 else packing.group_size
        if group == 0 or cols % group:
            self._fail(f"holds {codes.name} of {cols} input features, which are not groups of {group}")

        count = cols // group
        by_row = packing.method == "compressed-tensors"
        words = -(-rows // run)
        scales = self._part(module, parts.scales, _SCALES)
        self._check(scales, (rows, count) if by_row else (count, rows))
        self._check_scales(scales)
        coding = Coding(
            layout=packing.method,
            bits=packing.bits,
            group=group,
            scale_dtype=scales.dtype,
            scales=scales.data,
            zeros=self._zeros(module, (words, count) if by_row else (count, words)),
            zero_shift=packing.zero_shift,
            group_index=self._group_index(module, cols, group),
        )
        return TensorView(f"{module}.weight", "CODES", (rows, cols), codes.data, coding)

    def _shape(self, module: str) -> tuple[int, int]:
        assert self._parts.shape is not None
        view = self._part(module, self._parts.shape, ("I64", "I32"))
        shape = np.frombuffer(view.data, np.int64 if view.dtype == "I64" else np.int32).tolist()
        if len(shape) != 2 or min(shape) < 1:
            self._fail(f"holds {view.name}={shape}; it must be two numbers")
        return shape[0], shape[1]

    def _zeros(self, module: str, shape: tuple[int, int]) -> memoryview | None:
        """Words of zero points; None where there are none, or all are those of signed codes."""
        if f"{module}.{self._parts.zeros}" not in self._stored.names():
            return None
        view = self._part(module, self._parts.zeros, ("I32",))
        self._check(view, shape)
        bits = self._packing.bits
        middle = ((1 << (bits - 1)) - self._packing.zero_shift) * (0xFFFFFFFF // ((1 << bits) - 1))
        return None if (np.frombuffer(view.data, np.uint32) == middle).all() else view.data

    def _group_index(self, module: str, cols: int, group: int) -> memoryview | None:
        if f"{module}.{self._parts.group_index}" not in self._stored.names():
            return None
        view = self._part(module, self._parts.group_index, ("I32",))
        self._check(view, (cols,))
        index = np.frombuffer(view.data, np.int32)
        if (index == np.arange(cols) // group).all():
            return None
        if index.min() < 0 or index.max() >= cols // group:
            self._fail(f"holds {view.name} with groups {index.min()} to {index.max()} of {cols // group}")
        return index.copy().data

    def _check_scales(self, view: TensorView) -> None:
        if view.dtype == "BF16":
            values = (np.frombuffer(view.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(view.data, np.float16 if view.dtype == "F16" else np.float32)
        largest = float(np.abs(values).max(initial=0))
        most = _MOST_HALF / (1 << self._packing.bits)
        if not largest <= most:
            self._fail(
                f"holds {view.name} with scales up to {largest:g}; codes of {self._packing.bits} bits"
                f" with scales above {most:g} are not supported, so take the model's unquantized weights"
            )

    def _part(self, module: str, part: str, dtypes: Collection[str]) -> TensorView:
        return self._stored.tensor(f"{module}.{part}", dtypes)

    def _check(self, view: TensorView, shape: tuple[int, ...]) -> None:
        if view.shape != shape:
            self._fail(
                f"holds {view.name} of shape {list(view.shape)}; {self._packing.method} with"
                f" {self._packing.bits} bits and group_size={self._packing.group_size} needs {list(shape)}"
            )

    def _fail(self, message: str) -> NoReturn:
        raise ModelLoadError(f"{self._stored.path} {message}")
