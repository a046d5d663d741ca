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
                part = _Part(tensor, source)
                pack_linear(
                    self._team, *part.rows, self.address(parameter), _NAMES[self.dtype], row, **part.columns
                )
                row += len(source.rows)
            target = self.bias(parameter)
            for source in parameter.biases if target else ():
                self._convert(tensor, source, target, "float32")
                target += 4 * len(source.rows)

    def _convert(
        self, tensor: Callable[[str], TensorView], source: Source, target: int, dtype: DType
    ) -> None:
        part = _Part(tensor, source)
        convert(self._team, *part.rows, target, _NAMES[dtype], **part.columns)

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


class _Part:
    """What `pack_linear` and `convert` take to find this rank's part of a stored tensor."""

    def __init__(self, tensor: Callable[[str], TensorView], source: Source) -> None:
        view = _readable(tensor(source.name))
        # A vector is one row, of which a rank takes columns.
        if len(source.shape) == 1:
            height, width, rows, columns = 1, source.shape[0], range(1), source.rows
        else:
            (height, width), rows, columns = (
                source.shape,
                source.rows,
                source.columns or range(source.shape[1]),
            )
        row_bytes = len(view.data) // height
        data = view.data[rows.start * row_bytes : rows.stop * row_bytes]
        self.rows = (view.dtype, data, len(rows), width)
        self.columns = {"col_start": columns.start, "col_stop": columns.stop}


def _readable(view: TensorView) -> TensorView:
    """float64, which the native conversion does not know, as float32."""
    if view.dtype != "F64":
        return view
    values = np.frombuffer(view.data, np.float64).astype(np.float32)
    return view._replace(dtype="F32", data=memoryview(values.view(np.uint8)))
