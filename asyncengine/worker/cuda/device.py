"""Streams, events, graphs and memory of one GPU, and the same on the host, where kernels are interpreted.

Work is launched on the compute stream, which is the current one of the thread that made the device. What
crosses between host and device has streams of its own, so that it runs beside the steps.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from ..memory import available_bytes

__all__ = ["CudaDevice", "Device", "Event", "HostDevice", "open_device"]


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Waits until the stream has come there."""
        ...


class Device(Protocol):
    """What differs between a GPU and the host."""

    place: torch.device
    attention_programs: int | None
    """Grid of decode attention; None: as many as run at once."""

    def pinned(self, words: int) -> torch.Tensor:
        """int32 [words] in host memory that copies of either direction may use without waiting."""
        ...

    def send(self, words: NDArray[np.int32]) -> torch.Tensor:
        """`words` in new memory of the device, in the order of the compute stream."""
        ...

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies pinned memory to the device; what is launched next sees it."""
        ...

    def download(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Copies what has been computed up to now to pinned memory; the event of its arrival."""
        ...

    def await_download(self) -> None:
        """What is launched next may overwrite what has been downloaded up to now."""
        ...

    def mark(self) -> Event:
        """An event in the compute stream."""
        ...

    def microseconds(self, began: Event, ended: Event) -> int:
        """Time between two marks, both of them reached."""
        ...

    def synchronize(self) -> None:
        """Waits for everything."""
        ...

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Records what `launch` launches, which has run before; the result replays it. All captures share
        their memory, so that a replay leaves behind only what was written to tensors made outside."""
        ...

    def forget_captures(self) -> None:
        """What was recorded is not replayed any more; later captures share memory of their own."""
        ...

    def lock(self, address: int, nbytes: int) -> None:
        """Page-locks host memory, so that copies of either direction need not wait."""
        ...

    def unlock(self, address: int) -> None:
        """Undoes `lock`."""
        ...

    def attach(self) -> None:
        """To be called on every further thread that waits for events: a thread begins with the first GPU,
        and would start a context there."""
        ...

    def release(self) -> None:
        """Gives back the memory that the allocator keeps unused."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all there are, after a `release`."""
        ...

    def allocated(self) -> int:
        """Bytes in tensors."""
        ...

    def peak(self, launch: Callable[[], None]) -> int:
        """Most bytes in tensors while `launch` runs."""
        ...


class CudaDevice:
    """A GPU, which becomes the current one of the calling thread."""

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)
        self.attention_programs: int | None = None
        torch.cuda.set_device(self.place)
        self._compute = torch.cuda.Stream(self.place)
        self._uploads = torch.cuda.Stream(self.place)
        self._downloads = torch.cuda.Stream(self.place)
        self._pool = torch.cuda.graph_pool_handle()
        self._locked = set[int]()
        torch.cuda.set_stream(self._compute)

    def pinned(self, words: int) -> torch.Tensor:
        return torch.empty(words, dtype=torch.int32, pin_memory=True)

    def send(self, words: NDArray[np.int32]) -> torch.Tensor:
        # PyTorch keeps the pinned copy until the device has read it.
        return torch.from_numpy(words).pin_memory().to(self.place, non_blocking=True)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._uploads):
            target.copy_(source, non_blocking=True)
        self._compute.wait_stream(self._uploads)

    def download(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        self._downloads.wait_stream(self._compute)
        with torch.cuda.stream(self._downloads):
            target.copy_(source, non_blocking=True)
        return self._at(self._downloads, torch.cuda.Event())

    def await_download(self) -> None:
        self._compute.wait_stream(self._downloads)

    def mark(self) -> Event:
        return self._at(self._compute, torch.cuda.Event(enable_timing=True))

    def microseconds(self, began: Event, ended: Event) -> int:
        assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
        return int(began.elapsed_time(ended) * 1e3)

    @staticmethod
    def _at(stream: torch.cuda.Stream, event: torch.cuda.Event) -> Event:
        event.record(stream)
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        # Not `torch.cuda.graph`, which collects garbage and empties caches before every single graph.
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        # Other threads of this process, such as NCCL's watchdog, may use CUDA meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            launch()
        except BaseException:
            with suppress(RuntimeError):  # that what was captured is void says less than why
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay

    def forget_captures(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def lock(self, address: int, nbytes: int) -> None:
        if nbytes:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
            self._locked.add(address)

    def unlock(self, address: int) -> None:
        if address in self._locked:
            self._locked.remove(address)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))

    def attach(self) -> None:
        torch.cuda.set_device(self.place)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def memory(self) -> tuple[int, int]:
        self.release()
        return torch.cuda.mem_get_info(self.place)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.place)

    def peak(self, launch: Callable[[], None]) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.place)
        launch()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.place)


class _Moment:
    def __init__(self) -> None:
        self.nanoseconds = time.perf_counter_ns()

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class HostDevice:
    """The host in place of a GPU: everything is done at once, and a graph is its own launch."""

    def __init__(self) -> None:
        self.place = torch.device("cpu")
        self.attention_programs: int | None = 3

    def pinned(self, words: int) -> torch.Tensor:
        return torch.empty(words, dtype=torch.int32)

    def send(self, words: NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(words).clone()

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def download(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        target.copy_(source)
        return _Moment()

    def await_download(self) -> None:
        """Downloads are over when they return."""

    def mark(self) -> Event:
        return _Moment()

    def microseconds(self, began: Event, ended: Event) -> int:
        assert isinstance(began, _Moment) and isinstance(ended, _Moment)
        return (ended.nanoseconds - began.nanoseconds) // 1000

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        return launch

    def forget_captures(self) -> None:
        """A launch has no memory."""

    def lock(self, address: int, nbytes: int) -> None:
        """Copies do not wait for anything."""

    def unlock(self, address: int) -> None:
        """Nothing was locked."""

    def attach(self) -> None:
        """All threads see the host."""

    def release(self) -> None:
        """Nothing is kept."""

    def memory(self) -> tuple[int, int]:
        free = available_bytes()
        return free, free

    def allocated(self) -> int:
        return 0

    def peak(self, launch: Callable[[], None]) -> int:
        launch()
        return 0


def open_device(rank: int) -> Device:
    """The GPU of a rank, among those that are visible. Raises ConfigError where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if rank >= count:
        found = "PyTorch finds no usable GPU" if count == 0 else f"PyTorch finds {count} GPUs"
        raise ConfigError(
            f"device='cuda' needs a GPU for rank {rank}, and {found}; use device='cpu', a smaller"
            " tensor_parallel_size, or see to the driver, CUDA_VISIBLE_DEVICES and the build of PyTorch",
            parameter="device",
            value="cuda",
        )
    return CudaDevice(rank)
