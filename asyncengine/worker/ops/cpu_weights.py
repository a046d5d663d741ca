"""Weights as the CPU kernels read them: linears packed, all in one mapping with large pages."""

from collections.abc import Callable, Iterable

import numpy as np

from asyncengine._fast.cpu import Buffer, Team, convert, pack_linear, packed_bytes

from ...checkpoint.spec import DType
from ...checkpoint.tensor import TensorView
from ..models.parameters import Embedding, Linear, Parameter, Source, Vector

__all__ = ["ITEM_SIZES", "CpuWeights"]

ITEM_SIZES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIGNMENT = 64


class CpuWeights:
    """All parameters of a rank. Sources are converted straight from the mapped file, row by row."""

    def __init__(self, team: Team, parameters: Iterable[Parameter], dtype: DType) -> None:
        self.dtype = dtype
        self._team = team
        self._offsets: dict[Parameter, int] = {}
        self._bias_offsets: dict[Linear, int] = {}
        self.nbytes = 0
        for parameter in parameters:
            self._offsets[parameter] = self._reserve(self._size(parameter))
            if isinstance(parameter, Linear) and any(len(bias.rows) for bias in parameter.biases):
                self._bias_offsets[parameter] = self._reserve(4 * parameter.out_features)
        self._memory = Buffer(self.nbytes)

    def address(self, parameter: Parameter) -> int:
        return self._memory.address + self._offsets[parameter]

    def bias(self, parameter: Linear) -> int:
        offset = self._bias_offsets.get(parameter)
        return 0 if offset is None else self._memory.address + offset

    def put(self, parameter: Parameter, tensor: Callable[[str], TensorView]) -> None:
        if isinstance(parameter, Embedding):
            self._convert(tensor, parameter.source, self.address(parameter), self.dtype)
        elif isinstance(parameter, Vector):
            self._convert(tensor, parameter.source, self.address(parameter), "float32")
        else:
            row = 0
            for source in parameter.sources:
                stored, data, width, columns = _part(source, tensor(source.name))
                pack_linear(
                    self._team,
                    stored,
                    data,
                    len(source.rows),
                    width,
                    self.address(parameter),
                    _NAMES[self.dtype],
                    row,
                    col_start=columns.start,
                    col_stop=columns.stop,
                )
                row += len(source.rows)
            target = self.bias(parameter)
            for source in parameter.biases if target else ():
                self._convert(tensor, source, target, "float32")
                target += 4 * len(source.rows)

    def _convert(
        self, tensor: Callable[[str], TensorView], source: Source, target: int, dtype: DType
    ) -> None:
        stored, data, width, columns = _part(source, tensor(source.name))
        convert(
            self._team,
            stored,
            data,
            len(source.rows) if len(source.shape) == 2 else 1,
            width,
            target,
            _NAMES[dtype],
            col_start=columns.start,
            col_stop=columns.stop,
        )

    def _size(self, parameter: Parameter) -> int:
        if isinstance(parameter, Linear):
            return packed_bytes(parameter.out_features, parameter.in_features, _NAMES[self.dtype])
        if isinstance(parameter, Embedding):
            return ITEM_SIZES[self.dtype] * parameter.width * len(parameter.source.rows)
        return 4 * parameter.size

    def _reserve(self, nbytes: int) -> int:
        offset = self.nbytes
        self.nbytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return offset


def _readable(view: TensorView) -> TensorView:
    """float64, which the native conversion does not know, as float32."""
    if view.dtype != "F64":
        return view
    values = np.frombuffer(view.data, np.float64).astype(np.float32)
    return view._replace(dtype="F32", data=values.view(np.uint8).data)


def _part(source: Source, stored: TensorView) -> tuple[str, memoryview, int, range]:
    """Type, bytes and width of the stored rows that this rank takes, and its columns of them."""
    view = _readable(stored)
    if len(source.shape) == 1:  # one row, of which a rank takes columns
        return view.dtype, view.data, source.shape[0], source.rows
    height, width = source.shape
    row_bytes = len(view.data) // height
    data = view.data[source.rows.start * row_bytes : source.rows.stop * row_bytes]
    return view.dtype, data, width, source.columns or range(width)
