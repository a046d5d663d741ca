"""The actor: admits requests, plans steps ahead of the workers, commits their results.

Everything runs in callbacks of the event loop that created the engine; nothing here waits. A step is
planned before the results of earlier ones are known: two are in flight in steady state, so that the
workers never wait for the host. Where a host program blocks its loop and they do run dry, the depth
grows for as long as that lasts.
"""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import msgspec

from ..errors import (
    AsyncEngineError,
    EngineClosedError,
    EngineDeadError,
    OutOfMemoryError,
    RequestFailedError,
    RequestTimeoutError,
)
from ..metrics import EngineMetrics
from ..outputs import FinishReason
from ..scheduling.scheduler import Scheduler
from ..scheduling.sequence import Sequence
from ..wire.stages import Sleep, Slept, Woken
from .request import Completion, Request
from .supervisor import WorkerGroup

__all__ = ["EngineCore"]

MIN_DEPTH = 2
MAX_DEPTH = 8
CALM_STEPS = 64
"""Steps without the workers running dry after which the depth shrinks by one."""

_logger = logging.getLogger("asyncengine")


class EngineCore:
    """One engine's requests, scheduler and workers, tied together on one event loop."""

    def __init__(self, scheduler: Scheduler, workers: WorkerGroup) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread_id = threading.get_ident()
        self.scheduler = scheduler
        self.workers = workers
        self.metrics = EngineMetrics()
        self.requests: dict[str, Request] = {}
        """Every request that has not ended, also while its prompt is being tokenized."""
        self.error: AsyncEngineError | None = None
        """Why the engine takes no more requests; None while it does."""
        self._inflight = 0
        self._unsent: bytes | None = None
        """A plan for which the ring had no room."""
        self._depth = MIN_DEPTH
        self._calm = 0
        self._results = 0
        self._pumping = False
        self._idle: list[asyncio.Future[None]] = []
        self.sleep_level = 0
        """0: awake. Otherwise no request is taken; see `sleep`."""
        self._changing_sleep = asyncio.Lock()

    # Requests

    def open(self, request: Request, timeout: float | None) -> None:
        """Takes responsibility for the request: from now on it is answered, whatever happens."""
        self.requests[request.id] = request
        if timeout is not None:
            request.timer = self.loop.call_later(timeout, self._expire, request, timeout)

    def admit(self, request: Request, sequences: list[Sequence]) -> None:
        """Queues the sequences. Raises `QueueFullError` or `InvalidRequestError`, with nothing queued."""
        self.scheduler.add(sequences)
        for completion, sequence in zip(request.completions, sequences, strict=True):
            sequence.owner = (request, completion)
            completion.attach(sequence, self.scheduler)
        self.metrics.prompt_tokens += len(request.prompt_token_ids)
        self._pump_soon()

    def cancel(self, request: Request) -> None:
        """Ends the request with `finish_reason="cancelled"`; its blocks are free when this returns."""
        if not request.finished:
            self._end_all(request, None, "cancelled")

    def cancel_soon(self, request: Request) -> None:
        """As `cancel`, from any thread or from the garbage collector."""
        try:
            self.loop.call_soon_threadsafe(self.cancel, request)
        except RuntimeError:
            pass  # The loop is closed, and the workers with it.

    def fail(self, request: Request, error: BaseException) -> None:
        """Ends the request with an error for whoever waits on it."""
        if not request.finished:
            self._end_all(request, error, "error")

    def _expire(self, request: Request, timeout: float) -> None:
        if not request.finished:
            error = RequestTimeoutError(f"request {request.id!r} did not finish within {timeout:g} s")
            self._end_all(request, error, "timeout")

    def _end_all(self, request: Request, error: BaseException | None, reason: FinishReason) -> None:
        for completion in request.completions:
            if not completion.finished:
                if completion.sequence is not None:
                    self.scheduler.abort(completion.sequence)
                completion.finish(reason)
        request.error = error
        self._settle(request)
        self._pump_soon()

    def _settle(self, request: Request) -> None:
        """Everything is over for this request; tells its waiters."""
        self.requests.pop(request.id, None)
        request.settle()
        for completion in request.completions:
            if completion.sequence is not None:
                completion.sequence.owner = None  # or the two would keep each other
            reason = str(completion.output.finish_reason)
            self.metrics.finished[reason] = self.metrics.finished.get(reason, 0) + 1
        if request.metrics.total is not None:
            self.metrics.e2e_latency.observe(request.metrics.total)
        self._tell_idle()

    def _tell_idle(self) -> None:
        if not self.requests:
            for future in self._idle:
                if not future.done():
                    future.set_result(None)

    async def wait_idle(self, *, steps: bool = False) -> None:
        """Returns once no request is left; with `steps`, once no step is in flight either."""
        while self.requests or (steps and self.error is None and self.scheduler.in_flight):
            future: asyncio.Future[None] = self.loop.create_future()
            self._idle.append(future)
            try:
                await future
            finally:
                self._idle.remove(future)

    # Steps

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        if self.error is None:
            try:
                self._send_steps()
            except Exception as error:
                self._die_of(error)

    def _send_steps(self) -> None:
        """Plans and sends steps until enough of them are in flight."""
        self._adapt_depth()
        while self._inflight < self._depth:
            if self._unsent is None:
                plan = self.scheduler.plan()
                if plan is None:
                    return
                self._unsent = plan.data
                for sequence in plan.admitted:
                    self._mark_started(sequence)
            if not self.workers.send_plan(self._unsent):
                if self._inflight == 0:
                    raise RuntimeError("the workers have answered every plan but read none of the last ones")
                return  # There will be room when the next result comes.
            self._unsent = None
            self._inflight += 1

    def _adapt_depth(self) -> None:
        results, self._results = self._results, 0
        if results == 0:
            return
        if self._inflight == 0 and results >= self._depth and self.scheduler.has_work:
            self._depth = min(self._depth + 1, MAX_DEPTH)
            self._calm = 0
        elif self._depth > MIN_DEPTH:
            self._calm += 1
            if self._calm >= CALM_STEPS:
                self._depth -= 1
                self._calm = 0

    def _mark_started(self, sequence: Sequence) -> None:
        request: Request = sequence.owner[0]
        if request.metrics.queue is None:
            request.metrics.queue = request.age
            self.metrics.queue_time.observe(request.metrics.queue)

    def on_result(self, data: bytes) -> None:
        """Commits the result of the oldest step in flight."""
        if self.error is None:
            try:
                self._commit(data)
            except Exception as error:
                self._die_of(error)

    def _commit(self, data: bytes) -> None:
        self._inflight -= 1
        self._results += 1
        commit = self.scheduler.commit(data)
        self.metrics.steps += 1
        self.metrics.generation_tokens += len(commit.progressed)
        self.metrics.step_device_seconds.observe(commit.device_us * 1e-6)
        for sequence, row in commit.logprobs:
            sequence.owner[1].add_logprobs(row)
        for sequence in commit.progressed:
            if sequence.owner is None:  # an earlier token of this step completed a stop string
                continue
            request, completion = sequence.owner
            if request.metrics.first_token is None:
                self._mark_first_token(request)
            if completion.stops is not None and not completion.finished and completion.absorb():
                self.scheduler.abort(sequence, "stop")
                dropped = self.scheduler.generated(sequence, len(completion.output.token_ids))
                self.metrics.generation_tokens -= len(dropped)
                self._end(request, completion, "stop", None)
            else:
                request.wake()
        for sequence in commit.ended:
            if sequence.owner is None:  # settled just now, by a stop string or a sibling's failure
                continue
            request, completion = sequence.owner
            if sequence.error is not None:
                self.fail(request, RequestFailedError(sequence.error))
            elif not completion.finished and sequence.finish_reason is not None:
                self._end(request, completion, sequence.finish_reason, sequence.stop_reason)
        self._tell_idle()
        self._pump_soon()

    def _mark_first_token(self, request: Request) -> None:
        request.metrics.first_token = request.age
        request.metrics.prefill = request.metrics.first_token - (request.metrics.queue or 0.0)
        self.metrics.time_to_first_token.observe(request.metrics.first_token)

    def _end(
        self, request: Request, completion: Completion, reason: FinishReason, stop_reason: str | int | None
    ) -> None:
        completion.finish(reason, stop_reason)
        if request.finished:
            self._settle(request)
        else:
            request.wake()

    # Sleep

    async def sleep(self, level: int) -> None:
        """Takes no more requests, awaits those in flight, and gives memory back; as `stages.Sleep` tells.

        A caller that is cancelled while requests are awaited finds the engine as it was.
        """
        async with self._changing_sleep:
            before = self.sleep_level
            if level <= before:
                return
            self.sleep_level = level
            try:
                await self.wait_idle(steps=True)
            except BaseException:
                self.sleep_level = before
                raise
            replies = await _uninterrupted(self._command("sleep", msgspec.msgpack.encode(Sleep(level))))
            self.scheduler.reset_prefix_cache()
            lacking = [reason for r in replies if (reason := msgspec.msgpack.decode(r, type=Slept).lacking)]
            if lacking:
                await _uninterrupted(self._command("wake_up"))
                self.sleep_level = 0
                raise OutOfMemoryError(f"the engine cannot sleep and stays awake: {lacking[0]}; use level=2")

    async def wake_up(self) -> None:
        """Takes the memory again. Raises `OutOfMemoryError` and sleeps on where there is too little."""
        async with self._changing_sleep:
            if self.sleep_level == 0:
                return
            level = self.sleep_level
            replies = await _uninterrupted(self._command("wake_up"))
            lacking = [reason for r in replies if (reason := msgspec.msgpack.decode(r, type=Woken).lacking)]
            if lacking:
                # The other ranks have woken up.
                await _uninterrupted(self._command("sleep", msgspec.msgpack.encode(Sleep(level))))
                raise OutOfMemoryError(f"the engine cannot wake up and sleeps on: {lacking[0]}")
            self.sleep_level = 0

    async def _command(self, name: str, payload: bytes = b"") -> list[bytes]:
        """Runs one command on all ranks, in the manner of a stage of the start."""
        if self.error is not None:
            raise self.error
        try:
            return await self.workers.run_stage(name, payload)
        except AsyncEngineError as error:
            self.die(error if isinstance(error, EngineDeadError) else EngineDeadError(str(error)))
            raise

    # The end

    def die(self, error: EngineDeadError) -> None:
        """A worker is gone: every request fails with `error`, and so does every later one."""
        if self.error is None:
            _logger.error("engine is dead: %s", error)
            self._stop_with(error)
            self.workers.kill()

    def _die_of(self, error: Exception) -> None:
        """A defect of ours: whoever waits hears of it instead of waiting for ever."""
        _logger.error("the engine loop failed", exc_info=error)
        dead = EngineDeadError(f"the engine loop failed: {type(error).__name__}: {error}")
        dead.__cause__ = error
        self.die(dead)

    def close(self) -> None:
        """Takes no more requests and fails those in flight with `EngineClosedError`."""
        if self.error is None or isinstance(self.error, EngineDeadError):
            self._stop_with(EngineClosedError("the engine was closed"))

    def _stop_with(self, error: AsyncEngineError) -> None:
        self.error = error
        for request in list(self.requests.values()):
            self._end_all(request, error, "error")
        self._tell_idle()


async def _uninterrupted(coroutine: Coroutine[Any, Any, list[bytes]]) -> list[bytes]:
    """Runs it to its end also where the caller is cancelled: the ranks do not stop half-way."""
    task = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
