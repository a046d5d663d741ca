"""Weights as the CPU kernels read them: linears packed, all in one mapping with large pages."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from asyncengine._fast.cpu import PANEL, Buffer, Codes, Team, convert, pack_linear, packed_bytes

from ...checkpoint.spec import DType
from ...checkpoint.tensor import Checkpoint, Coding, TensorView
from ..models.parameters import Embedding, Linear, Parameter, Source, Vector
from .cpu import Packed
from .weight_format import WeightFormat, choose_formats, rows_of

__all__ = ["CpuWeights", "stored_part"]

_ALIGNMENT = 64


class CpuWeights:
    """All parameters of a rank. Sources are converted straight from the mapped file, row by row.

    A table that the head shares is stored once, as the head.
    """

    def __init__(
        self,
        team: Team,
        parameters: Sequence[Parameter],
        checkpoint: Checkpoint,
        dtype: DType,
        quantization: str | None,
    ) -> None:
        self._team = team
        weights = [p for p in parameters if not isinstance(p, Vector)]
        self._formats = choose_formats(weights, quantization, dtype, checkpoint.tensor, team.level)
        self.group = rows_of(self._formats.values(), team.level)
        heads = {p.sources: p for p in parameters if isinstance(p, Linear) and p.is_head}
        self._shared = {
            p: heads[(p.source,)] for p in parameters if isinstance(p, Embedding) and (p.source,) in heads
        }
        self._offsets: dict[Parameter, int] = {}
        self._bias_offsets: dict[Linear, int] = {}
        self.nbytes = 0
        for parameter in parameters:
            if parameter in self._shared:
                continue
            self._offsets[parameter] = self._reserve(self._size(parameter))
            if isinstance(parameter, Linear) and any(len(bias.rows) for bias in parameter.biases):
                self._bias_offsets[parameter] = self._reserve(4 * _packed_rows(parameter))
        self._memory = Buffer(self.nbytes)

    def vector(self, parameter: Vector) -> int:
        return self._address(parameter)

    def packed(self, parameter: Embedding | Linear) -> Packed:
        if isinstance(parameter, Embedding) and parameter in self._shared:
            return self.packed(self._shared[parameter])._replace(bias=0)
        bias = self._bias_offsets.get(parameter) if isinstance(parameter, Linear) else None
        return Packed(
            self._address(parameter),
            self._formats[parameter],
            0 if bias is None else self._memory.address + bias,
            self._in_panels(parameter),
        )

    def discard(self) -> None:
        """Gives the memory back. All parameters are to be put again, to the same places."""
        self._memory.discard()

    def put(self, parameter: Parameter, tensor: Callable[[str], TensorView]) -> None:
        """Takes this rank's part of `parameter`."""
        if parameter in self._shared:
            return
        if isinstance(parameter, Vector):
            self._convert(tensor, parameter.source, self._address(parameter), "F32")
        elif not self._in_panels(parameter):
            assert isinstance(parameter, Embedding)
            self._convert(tensor, parameter.source, self._address(parameter), self._formats[parameter].dtype)
        else:
            sources = parameter.sources if isinstance(parameter, Linear) else (parameter.source,)
            self._pack(
                tensor, sources, self._address(parameter), self._formats[parameter], _is_gated(parameter)
            )
            if parameter in self._bias_offsets:
                assert isinstance(parameter, Linear)
                self._put_bias(tensor, parameter)

    def _pack(
        self,
        tensor: Callable[[str], TensorView],
        sources: Iterable[Source],
        target: int,
        format: WeightFormat,
        is_gated: bool,
    ) -> None:
        row = 0
        for index, source in enumerate(sources):
            part = stored_part(source, tensor(source.name))
            pack_linear(
                self._team,
                part.dtype,
                part.data,
                len(source.rows),
                part.width,
                target,
                format.dtype,
                0 if is_gated else row,
                group=format.group,
                minimum=format.minimum,
                row_start=part.row_start,
                col_start=part.columns.start,
                col_stop=part.columns.stop,
                panel_stride=2 if is_gated else 1,
                panel_offset=index if is_gated else 0,
            )
            row += len(source.rows)

    def _put_bias(self, tensor: Callable[[str], TensorView], parameter: Linear) -> None:
        target = self._memory.address + self._bias_offsets[parameter]
        if not parameter.is_gated:
            for source in parameter.biases:
                self._convert(tensor, source, target, "F32")
                target += 4 * len(source.rows)
            return
        # In the order of the panels: as the weight's rows.
        halves = Buffer(4 * _packed_rows(parameter))
        values = np.frombuffer(memoryview(halves), np.float32).reshape(2, -1, PANEL)
        for source, half in zip(parameter.biases, values, strict=True):
            self._convert(tensor, source, half.ctypes.data, "F32")
        offset = self._bias_offsets[parameter]
        placed = np.frombuffer(memoryview(self._memory), np.float32, values.size, offset)
        placed.reshape(-1, 2, PANEL)[:] = values.swapaxes(0, 1)

    def _convert(self, tensor: Callable[[str], TensorView], source: Source, target: int, dtype: str) -> None:
        part = stored_part(source, tensor(source.name))
        convert(
            self._team,
            part.dtype,
            part.data,
            len(source.rows) if len(source.shape) == 2 else 1,
            part.width,
            target,
            dtype,
            row_start=part.row_start,
            col_start=part.columns.start,
            col_stop=part.columns.stop,
        )

    def _in_panels(self, parameter: Embedding | Linear) -> bool:
        """Plain tables lie in rows, which are read whole; all else in panels."""
        return isinstance(parameter, Linear) or self._formats[parameter].group != 0

    def _address(self, parameter: Parameter) -> int:
        return self._memory.address + self._offsets[parameter]

    def _size(self, parameter: Parameter) -> int:
        if isinstance(parameter, Vector):
            return 4 * parameter.size
        format = self._formats[parameter]
        if isinstance(parameter, Linear):
            rows, columns = _packed_rows(parameter), parameter.in_features
        else:
            rows, columns = len(parameter.source.rows), parameter.width
        if not self._in_panels(parameter):
            return rows * columns * (4 if format.dtype == "F32" else 2)
        return packed_bytes(rows, columns, format.dtype, format.group, format.minimum)

    def _reserve(self, nbytes: int) -> int:
        offset = self.nbytes
        self.nbytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return offset


def _is_gated(parameter: Embedding | Linear) -> bool:
    return isinstance(parameter, Linear) and parameter.is_gated


def _packed_rows(parameter: Linear) -> int:
    """Rows with the padding between the halves of a gated pair, each of which fills its panels."""
    if not parameter.is_gated:
        return parameter.out_features
    return 2 * (-(-parameter.out_features // 2 // PANEL) * PANEL)


def _readable(view: TensorView) -> TensorView:
    """float64, which the native conversion does not know, as float32."""
    if view.dtype != "F64":
        return view
    values = np.frombuffer(view.data, np.float64).astype(np.float32)
    return view._replace(dtype="F32", data=values.view(np.uint8).data)


class StoredPart(NamedTuple):
    """What of a stored tensor a rank takes, as `pack_linear` and `convert` read it."""

    dtype: str
    data: memoryview | Codes
    """All of the tensor."""
    width: int
    row_start: int
    columns: range


def stored_part(source: Source, stored: TensorView) -> StoredPart:
    view = _readable(stored)
    if len(source.shape) == 1:  # one row, of which a rank takes columns
        return StoredPart(view.dtype, view.data, source.shape[0], 0, source.rows)
    height, width = source.shape
    data = view.data if view.coding is None else _codes(height, width, view.data, view.coding)
    return StoredPart(view.dtype, data, width, source.rows.start, source.columns or range(width))


def _codes(rows: int, columns: int, data: memoryview, coding: Coding) -> Codes:
    return Codes(
        coding.layout,
        coding.bits,
        rows,
        columns,
        coding.group,
        data,
        coding.scale_dtype,
        coding.scales,
        coding.zeros,
        coding.zero_shift,
        coding.group_index,
    )
