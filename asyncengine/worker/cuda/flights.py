"""Steps under way: their buffers, and the thread that sends results home while later steps are launched."""

import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from msgspec import msgpack
from numpy.typing import NDArray

from asyncengine.kernels.sampler import Sampled

from ...wire.plan import RESULT_HEADER, ResultDetails, RowLogprobs
from ..sampler import NOT_FINITE
from .device import Device, Event
from .plan import Plan

__all__ = ["Draws", "Flight", "Flights"]

Ints = NDArray[np.int32]

_MOST = 2**31 - 1


class Draws:
    """What the sampler gives for up to `rows` rows, in one tensor, so that one copy brings it home."""

    def __init__(self, rows: int, logprobs: int, place: torch.device) -> None:
        self.rows, self.logprobs = rows, logprobs
        self.words = rows * (3 + 2 * logprobs)
        self.packed = torch.zeros(self.words, dtype=torch.int32, device=place)

    def of(self, packed: torch.Tensor) -> Sampled:
        """Views of `packed`, which is this tensor or a copy of it."""
        rows, width = self.rows, self.logprobs
        tokens, logprob, rank, ids, logprobs = packed.split([rows] * 3 + [rows * width] * 2)
        return Sampled(
            tokens,
            logprob.view(torch.float32),
            rank,
            ids.view(rows, width),
            logprobs.view(torch.float32).view(rows, width),
        )

    def first(self, count: int) -> Sampled:
        """The first so many rows."""
        return Sampled(*(part[:count] for part in self.of(self.packed)))


class Flight:
    """Memory of one step. Nobody touches it again before the step's result is home."""

    plan: torch.Tensor
    """int32 on the device, as `batch_update` reads it."""
    staged: torch.Tensor
    """The same in pinned memory."""

    def __init__(self, device: Device, words: int, draws: Draws) -> None:
        self._device = device
        self._draws = draws
        self._reserve(words)
        self.landed = device.pinned(draws.words)
        self._results = draws.of(self.landed)

    def stage(self, parts: Sequence[Ints]) -> int:
        """Writes a plan's parts one after the other; the number of words."""
        words = sum(part.size for part in parts)
        if words > len(self.staged):
            # The new memory may just have been given back by a kernel that still runs.
            self._device.synchronize()
            self._reserve(2 * words)
        np.concatenate([part.ravel() for part in parts], out=self._words[:words])
        return words

    def depart(self, plan: Plan) -> None:
        """The step's device work begins."""
        self._head = (plan.epoch, plan.step)
        self._began = self._device.mark()

    def arrive(self, num_logprobs: Ints) -> None:
        """The step's device work is launched, and its results follow it; `num_logprobs` of its samples."""
        self._ended = self._device.mark()
        self._num_logprobs = num_logprobs
        samples, draws = len(num_logprobs), self._draws
        wanted = bool((num_logprobs >= 0).any())
        words = draws.words if wanted else samples
        self._ready: Event = self._device.download(self.landed[:words], draws.packed[:words])

    def result(self) -> bytes:
        """Waits for the results; the message of `wire/plan.py`."""
        self._ready.synchronize()
        samples = len(self._num_logprobs)
        tokens = self._results.tokens[:samples].numpy()
        details = self._details(tokens)
        payload = b"" if details is None else msgpack.encode(details)
        spent = min(self._device.microseconds(self._began, self._ended), _MOST)
        header = np.zeros(RESULT_HEADER, np.int32)
        header[:5] = (*self._head, samples, len(payload), spent)
        return header.tobytes() + tokens.tobytes() + payload

    def _details(self, tokens: Ints) -> ResultDetails | None:
        failed = np.flatnonzero(tokens < 0).tolist()
        wanted = np.flatnonzero((self._num_logprobs >= 0) & (tokens >= 0)).tolist()
        if not failed and not wanted:
            return None
        _, logprob, rank, ids, logprobs = (part.numpy() for part in self._results)
        rows = {
            row: RowLogprobs(
                float(logprob[row]), int(rank[row]), ids[row, :count].tolist(), logprobs[row, :count].tolist()
            )
            for row, count in zip(wanted, self._num_logprobs[wanted].tolist(), strict=True)
        }
        return ResultDetails(rows, dict.fromkeys(failed, NOT_FINITE))

    def _reserve(self, words: int) -> None:
        self.staged = self._device.pinned(words)
        self._words: Ints = self.staged.numpy()
        # Not cleared: that would be work of the compute stream, and uploads do not wait for it.
        self.plan = torch.empty(words, dtype=torch.int32, device=self._device.place)


class Flights:
    """A few flights, and the thread that takes those under way home, in order.

    `deliver` is called on that thread, after `attach`. An error there ends the thread and goes to
    `threading.excepthook`; `take` raises from then on.
    """

    def __init__(
        self, flights: Sequence[Flight], attach: Callable[[], None], deliver: Callable[[bytes], None]
    ) -> None:
        self._attach = attach
        self._deliver = deliver
        self._error: BaseException | None = None
        self._free: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._away: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        for flight in flights:
            self._free.put(flight)
        self._thread = threading.Thread(target=self._bring_home, name="results", daemon=True)
        self._thread.start()

    def take(self) -> Flight:
        """A flight for the next step; waits for one."""
        flight = self._free.get()
        if flight is None:
            self._free.put(None)
            raise RuntimeError(f"results cannot be delivered any more: {self._error}") from self._error
        return flight

    def send(self, flight: Flight) -> None:
        """The flight's step is launched."""
        self._away.put(flight)

    def close(self) -> None:
        """Waits until all are home."""
        self._away.put(None)
        self._thread.join()

    def _bring_home(self) -> None:
        try:
            self._attach()
            while (flight := self._away.get()) is not None:
                self._deliver(flight.result())
                self._free.put(flight)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._free.put(None)
