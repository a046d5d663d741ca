"""Weights on the device: one tensor per parameter, of the engine's dtype and in the checkpoint's layout."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from asyncengine._fast.cpu import Team, convert

from ...checkpoint.spec import DType
from ...checkpoint.tensor import TensorView
from ..models.parameters import Embedding, Linear, Parameter, Source, Vector
from ..ops.cpu_weights import stored_part
from ..ops.weight_format import PLAIN
from .device import Device, Event

__all__ = ["TORCH_DTYPES", "Weights"]

STAGING_BYTES = 32 << 20

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Weights:
    """All parameters of a rank. A table that the head shares is stored once.

    `put` converts stored values of any type, a GGUF file's blocks among them, natively on `num_threads`
    threads, straight from the mapped file into one of two pinned buffers, while the other one is copied.
    """

    def __init__(
        self, device: Device, parameters: Sequence[Parameter], dtype: DType, num_threads: int
    ) -> None:
        self._device = device
        self._dtype: DType = dtype
        self._threads = num_threads
        heads = {p.sources: p for p in parameters if isinstance(p, Linear) and p.is_head}
        self._shared = {
            p: heads[(p.source,)] for p in parameters if isinstance(p, Embedding) and (p.source,) in heads
        }
        self._tensors: dict[Parameter, torch.Tensor] = {}
        self._biases: dict[Linear, torch.Tensor] = {}
        self._staging: _Staging | None = None
        self.expected_bytes = sum(self._size(p) for p in parameters if p not in self._shared)
        """What all parameters will take."""

    @property
    def nbytes(self) -> int:
        """What has been put, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that have been put."""
        yield from self._tensors.values()
        yield from self._biases.values()

    def vector(self, parameter: Vector) -> torch.Tensor:
        """float32 [size]"""
        return self._tensors[parameter]

    def table(self, parameter: Embedding) -> torch.Tensor:
        """[this rank's rows, width]"""
        return self._tensors[self._shared.get(parameter, parameter)]

    def linear(self, parameter: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [outputs, inputs], sources one below the other, and bias [outputs]."""
        return self._tensors[parameter], self._biases.get(parameter)

    def bias(self, parameter: Linear) -> torch.Tensor | None:
        """[outputs]"""
        return self._biases.get(parameter)

    def pop(self, parameter: Linear) -> torch.Tensor:
        """The weight of `parameter`, which is kept elsewhere from now on."""
        return self._tensors.pop(parameter)

    def move(self, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by another one of the same values."""
        # Both, or if that fails neither.
        tensors = {parameter: to(tensor) for parameter, tensor in self._tensors.items()}
        biases = {parameter: to(tensor) for parameter, tensor in self._biases.items()}
        self._device.synchronize()
        self._tensors, self._biases = tensors, biases

    def clear(self) -> None:
        """Gives all memory back; all parameters are to be put again."""
        self._tensors.clear()
        self._biases.clear()

    def put(self, parameter: Parameter, tensor: Callable[[str], TensorView]) -> None:
        """Takes this rank's part of `parameter`."""
        if parameter in self._shared:
            return
        if self._staging is None:
            self._staging = _Staging(self._device, self._threads)
        if isinstance(parameter, Vector):
            self._tensors[parameter] = self._load((parameter.source,), "float32", tensor)
        elif isinstance(parameter, Embedding):
            self._tensors[parameter] = self._load((parameter.source,), self._dtype, tensor)
        else:
            self._tensors[parameter] = self._load(parameter.sources, self._dtype, tensor)
            if any(len(bias.rows) for bias in parameter.biases):
                self._biases[parameter] = self._load(parameter.biases, self._dtype, tensor)

    def finish(self) -> None:
        """Gives back what only loading needs."""
        self._device.synchronize()
        self._staging = None

    def _load(
        self, sources: Sequence[Source], dtype: DType, tensor: Callable[[str], TensorView]
    ) -> torch.Tensor:
        sizes = [math.prod(_own_shape(source)) for source in sources]
        target = torch.empty(sum(sizes), dtype=TORCH_DTYPES[dtype], device=self._device.place)
        for source, part in zip(sources, target.split(sizes), strict=True):
            if len(part):
                assert self._staging is not None
                self._staging.move(part, source, tensor(source.name), dtype)
        own = _own_shape(sources[0])
        return target if len(sources[0].shape) == 1 else target.view(-1, own[1])

    def _size(self, parameter: Parameter) -> int:
        if isinstance(parameter, Vector):
            return 4 * parameter.size
        item = TORCH_DTYPES[self._dtype].itemsize
        if isinstance(parameter, Embedding):
            return item * len(parameter.source.rows) * parameter.width
        biases = sum(len(bias.rows) for bias in parameter.biases)
        return item * (parameter.out_features * parameter.in_features + biases)


class _Staging:
    """Two pinned buffers: one is filled while the other one is on its way to the device."""

    def __init__(self, device: Device, num_threads: int) -> None:
        self._device = device
        self._team = Team(num_threads)
        self._buffers = [device.pinned(STAGING_BYTES // 4) for _ in range(2)]
        self._copied: list[Event] = [device.mark(), device.mark()]
        self._turn = 0

    def move(self, target: torch.Tensor, source: Source, view: TensorView, dtype: DType) -> None:
        """Converts this rank's part of `view` and sends it to `target`, flat."""
        part = stored_part(source, view)
        rows, own = _own_shape(source)
        step = STAGING_BYTES // (own * target.itemsize)
        if step == 0:
            raise ValueError(f"a row of {source.name} is wider than the staging buffer")
        for first in range(0, rows, step):
            count = min(step, rows - first)
            turn = self._turn = 1 - self._turn
            self._copied[turn].synchronize()
            staged = self._buffers[turn].view(target.dtype)[: count * own]
            convert(
                self._team,
                part.dtype,
                part.data,
                count,
                part.width,
                staged.data_ptr(),
                PLAIN[dtype].dtype,
                row_start=part.row_start + first,
                col_start=part.columns.start,
                col_stop=part.columns.stop,
            )
            target[first * own : (first + count) * own].copy_(staged, non_blocking=True)
            self._copied[turn] = self._device.mark()


def _own_shape(source: Source) -> tuple[int, int]:
    """Rows and columns of a rank's part; a vector is one row, of which a rank takes columns."""
    if len(source.shape) == 1:
        return 1, len(source.rows)
    return len(source.rows), source.shape[1] if source.columns is None else len(source.columns)
