"""Weights as the CPU kernels read them: linears packed, all in one mapping with large pages."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from asyncengine._fast.cpu import (
    COMPACT,
    PANEL,
    Buffer,
    Codes,
    Team,
    compact,
    convert,
    pack_linear,
    packed_bytes,
)

from ...checkpoint.spec import DType
from ...checkpoint.tensor import Checkpoint, Coding, TensorView
from ...errors import ModelLoadError
from ..models.parameters import Embedding, Linear, Parameter, Source, Vector
from .cpu import Packed
from .weight_format import WeightFormat, choose_formats, rows_of

__all__ = ["CpuWeights", "stored_part"]

_ALIGNMENT = 64
_COMPACT_SHARE = 0.78
"""What compact weights take of the most that they can, where they are spread as trained ones are."""
_STAGED_BYTES = 4 << 20
"""Of packed panels that are made compact at a time: they stay in the caches."""


class CpuWeights:
    """All parameters of a rank. Sources are converted straight from the mapped file, row by row.

    A table that the head shares is stored once, as the head. How many bytes compact weights take, and where
    the next parameter starts, is known once they are there: memory is mapped for the most that it can be, and
    what is never touched costs nothing.
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
        self._places: dict[Parameter, _Place] = {}
        self.nbytes = 0
        """Of the parameters that are here."""
        most, spared = 0, 0.0
        for parameter in parameters:
            if parameter not in self._shared:
                most += _aligned(self._size(parameter)) + _aligned(_bias_bytes(parameter))
                if self._is_compact(parameter):
                    spared += (1 - _COMPACT_SHARE) * self._size(parameter)
        self.expected_bytes = most - int(spared)
        """Of all of them."""
        self._memory = Buffer(most)
        self._staged = Buffer(0)

    def vector(self, parameter: Vector) -> int:
        return self._address(parameter)

    def packed(self, parameter: Embedding | Linear) -> Packed:
        if isinstance(parameter, Embedding) and parameter in self._shared:
            return self.packed(self._shared[parameter])._replace(bias=0)
        return Packed(
            self._address(parameter),
            self._formats[parameter],
            self._bias_address(parameter) if _bias_bytes(parameter) else 0,
            self._in_panels(parameter),
        )

    def discard(self) -> None:
        """Gives the memory back. All parameters are to be put again, to the same places."""
        self._memory.discard()

    def put(self, parameter: Parameter, tensor: Callable[[str], TensorView]) -> None:
        """Takes this rank's part of `parameter`."""
        if parameter in self._shared:
            return
        known = self._places.get(parameter)
        offset = self.nbytes if known is None else known.offset
        place = _Place(offset, self._write(parameter, tensor, self._memory.address + offset))
        if known is None:
            self._places[parameter] = place
            self.nbytes = place.end + _aligned(_bias_bytes(parameter))
        elif place != known:
            raise ModelLoadError("the weights have changed on disk since they were loaded; make a new engine")
        if _bias_bytes(parameter):
            assert isinstance(parameter, Linear)
            self._put_bias(tensor, parameter)

    def finish(self) -> None:
        """All parameters are there."""
        self._staged = Buffer(0)

    def _write(self, parameter: Parameter, tensor: Callable[[str], TensorView], target: int) -> int:
        """The bytes that the parameter takes."""
        if isinstance(parameter, Vector):
            self._convert(tensor, parameter.source, target, "F32")
        elif not self._in_panels(parameter):
            assert isinstance(parameter, Embedding)
            self._convert(tensor, parameter.source, target, self._formats[parameter].dtype)
        elif self._is_compact(parameter):
            return self._pack_compact(parameter, tensor, target)
        else:
            panels = range(_packed_rows(parameter) // PANEL)
            self._pack(parameter, tensor, target, self._formats[parameter], panels)
        return self._size(parameter)

    def _pack_compact(
        self, parameter: Embedding | Linear, tensor: Callable[[str], TensorView], target: int
    ) -> int:
        rows, columns = _packed_rows(parameter), _columns(parameter)
        panel_bytes = packed_bytes(PANEL, columns, "BF16")
        step = max(2, _STAGED_BYTES // panel_bytes // 2 * 2)  # a gated pair is not parted
        if self._staged.nbytes < step * panel_bytes:
            self._staged = Buffer(step * panel_bytes)
        nbytes = 0
        for first in range(0, rows // PANEL, step):
            panels = range(first, min(first + step, rows // PANEL))
            if panels.stop == rows // PANEL:  # whose padding must not be what was there before
                self._staged.discard()
            self._pack(parameter, tensor, self._staged.address, WeightFormat("BF16"), panels)
            nbytes = compact(self._team, self._staged, rows, columns, target, first, len(panels))
        return nbytes

    def _pack(
        self,
        parameter: Embedding | Linear,
        tensor: Callable[[str], TensorView],
        target: int,
        format: WeightFormat,
        panels: range,
    ) -> None:
        """Packs some panels: the first of them goes to `target`."""
        is_gated = _is_gated(parameter)
        sources = parameter.sources if isinstance(parameter, Linear) else (parameter.source,)
        stride = 2 if is_gated else 1
        first, stop = panels.start // stride * PANEL, panels.stop // stride * PANEL
        row = 0
        for index, source in enumerate(sources):
            begin, end = max(first, row), min(stop, row + len(source.rows))
            if begin < end:
                part = stored_part(source, tensor(source.name))
                pack_linear(
                    self._team,
                    part.dtype,
                    part.data,
                    end - begin,
                    part.width,
                    target,
                    format.dtype,
                    begin - first,
                    group=format.group,
                    minimum=format.minimum,
                    row_start=part.row_start + begin - row,
                    col_start=part.columns.start,
                    col_stop=part.columns.stop,
                    panel_stride=stride,
                    panel_offset=index if is_gated else 0,
                )
            if not is_gated:
                row += len(source.rows)

    def _put_bias(self, tensor: Callable[[str], TensorView], parameter: Linear) -> None:
        target = self._bias_address(parameter)
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
        offset = target - self._memory.address
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

    def _is_compact(self, parameter: Parameter) -> bool:
        return not isinstance(parameter, Vector) and self._formats[parameter].group == COMPACT

    def _address(self, parameter: Parameter) -> int:
        return self._memory.address + self._places[parameter].offset

    def _bias_address(self, parameter: Embedding | Linear) -> int:
        return self._memory.address + self._places[parameter].end

    def _size(self, parameter: Parameter) -> int:
        """Its bytes; of a compact one, the most that they can be."""
        if isinstance(parameter, Vector):
            return 4 * parameter.size
        format = self._formats[parameter]
        if not self._in_panels(parameter):
            assert isinstance(parameter, Embedding)
            return len(parameter.source.rows) * parameter.width * (4 if format.dtype == "F32" else 2)
        return packed_bytes(
            _packed_rows(parameter), _columns(parameter), format.dtype, format.group, format.minimum
        )


class _Place(NamedTuple):
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where the bias is, if there is one."""
        return self.offset + _aligned(self.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _is_gated(parameter: Embedding | Linear) -> bool:
    return isinstance(parameter, Linear) and parameter.is_gated


def _columns(parameter: Embedding | Linear) -> int:
    return parameter.in_features if isinstance(parameter, Linear) else parameter.width


def _packed_rows(parameter: Embedding | Linear) -> int:
    """Rows with the padding of the last panel, or between the halves of a gated pair, each of which fills its
    panels."""
    rows = parameter.out_features if isinstance(parameter, Linear) else len(parameter.source.rows)
    halves = 2 if _is_gated(parameter) else 1
    return halves * (-(-rows // halves // PANEL) * PANEL)


def _bias_bytes(parameter: Parameter) -> int:
    if not isinstance(parameter, Linear) or not any(len(bias.rows) for bias in parameter.biases):
        return 0
    return 4 * _packed_rows(parameter)


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
