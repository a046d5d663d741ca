"""Weights in host memory: those that a GPU has no room for, and all of them while the engine sleeps."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from asyncengine._fast.cpu import Buffer

from ...checkpoint.tensor import TensorView
from ...errors import OutOfMemoryError
from ..memory import available_bytes
from ..models.parameters import Embedding, Linear, Parameter, Vector
from .device import Device
from .weights import Weights

__all__ = ["HostMemory", "Offload", "choose"]

_ALIGNMENT = 256


class HostMemory:
    """Page-locked memory for tensors of these sizes, of which copies are taken in.

    PyTorch's own pinned memory comes in powers of two and is never given back.
    """

    def __init__(self, device: Device, sizes: Iterable[int]) -> None:
        nbytes = sum(_room(size) for size in sizes)
        free = available_bytes()
        if nbytes > free:
            raise OutOfMemoryError(
                f"{nbytes:,} bytes of weights do not fit into host memory, of which {free:,} bytes are free"
            )
        self._device = device
        self._buffer = Buffer(nbytes)
        self._bytes = torch.frombuffer(memoryview(self._buffer), dtype=torch.uint8) if nbytes else None
        self._used = 0
        self.copies: list[torch.Tensor] = []
        """In the order in which they were taken in."""
        device.lock(self._buffer.address, nbytes)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor`, under way on the compute stream."""
        assert self._bytes is not None
        part = self._bytes[self._used : self._used + tensor.nbytes]
        copy = part.view(tensor.dtype).view(tensor.shape)
        self._used += _room(tensor.nbytes)
        self.copies.append(copy)
        return copy.copy_(tensor, non_blocking=True)

    def close(self) -> None:
        """Gives the memory back; nothing may be under way."""
        self._device.unlock(self._buffer.address)


def _room(nbytes: int) -> int:
    """What a tensor takes of a `HostMemory`."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Offload:
    """`Weights` of which some linears stay in host memory, and are copied to the device for each use.

    They are spread evenly over the layers. The copy is part of the step, in the order of the compute stream:
    a graph records it, and a step lasts as long as the bus needs for all of them.
    """

    def __init__(
        self, weights: Weights, device: Device, parameters: Sequence[Parameter], nbytes: int, item: int
    ) -> None:
        sizes = {
            p: item * p.out_features * p.in_features
            for p in parameters
            if isinstance(p, Linear) and not p.is_head
        }
        self._weights = weights
        self._device = device
        self._chosen = choose(sizes, nbytes)
        self._sizes = [sizes[p] for p in self._chosen]
        self._largest = max(self._sizes, default=0)
        self._memory: HostMemory | None = None
        self._away: dict[Linear, torch.Tensor] = {}
        self.expected_bytes = weights.expected_bytes - sum(self._sizes) + self._largest

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._weights.nbytes + (self._largest if self._away else 0)

    def vector(self, parameter: Vector) -> torch.Tensor:
        return self._weights.vector(parameter)

    def table(self, parameter: Embedding) -> torch.Tensor:
        return self._weights.table(parameter)

    def linear(self, parameter: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Weights.linear`; valid until the next call for one that is in host memory."""
        away = self._away.get(parameter)
        if away is None:
            return self._weights.linear(parameter)
        target = self._staging[: away.nbytes].view(away.dtype).view(away.shape)
        return target.copy_(away, non_blocking=True), self._weights.bias(parameter)

    def put(self, parameter: Parameter, tensor: Callable[[str], TensorView]) -> None:
        if self._memory is None:
            self._memory = HostMemory(self._device, self._sizes)
            self._staging = torch.empty(self._largest, dtype=torch.uint8, device=self._device.place)
        self._weights.put(parameter, tensor)
        if isinstance(parameter, Linear) and parameter in self._chosen:
            self._away[parameter] = self._memory.take(self._weights.pop(parameter))

    def finish(self) -> None:
        self._weights.finish()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Those on the device."""
        return self._weights.tensors()

    def move(self, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `Weights.move`, of what is on the device."""
        self._weights.move(to)

    def clear(self) -> None:
        """Gives all memory back; all parameters are to be put again."""
        self._weights.clear()
        self._away.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def choose(sizes: dict[Linear, int], nbytes: int) -> set[Linear]:
    """Linears of at most `nbytes` together, at even distances in the order of their use."""
    total, seen, taken = sum(sizes.values()), 0, 0
    chosen = set[Linear]()
    for parameter, size in sizes.items():
        seen += size
        if taken + size <= nbytes * seen // total:
            chosen.add(parameter)
            taken += size
    return chosen
