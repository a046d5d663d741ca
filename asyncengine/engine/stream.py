"""The caller's handle on a request: iterate it, await it, cancel it, or just drop it.

Leaving in any way cancels: `break`, an exception, task cancellation, or the last reference going away.
The engine itself never refers to the handle, so that dropping it is seen.
"""

import threading
from collections.abc import AsyncIterator, Generator
from types import TracebackType
from typing import Any, Protocol

from ..errors import InvalidRequestError
from ..outputs import Delta, RequestOutput
from .request import Request

__all__ = ["GenerationStream"]


class Canceller(Protocol):
    """What a stream needs of the engine."""

    thread_id: int

    def cancel(self, request: Request) -> None: ...

    def cancel_soon(self, request: Request) -> None: ...


class GenerationStream:
    """One request's output as it comes.

    `async for delta in stream` gives `Delta`s; `await stream` gives the whole `RequestOutput`;
    `async with stream` cancels on leaving. Iterating a cancelled stream ends it. A request that failed
    raises its error (`RequestFailedError`, `RequestTimeoutError`, `EngineDeadError`, ...) to whoever
    iterates or awaits it.
    """

    __slots__ = ("_engine", "_request")

    def __init__(self, engine: Canceller, request: Request) -> None:
        self._engine = engine
        self._request = request

    @property
    def request_id(self) -> str:
        return self._request.id

    @property
    def output(self) -> RequestOutput:
        """The output so far; `finished` tells whether it is final."""
        return self._request.output()

    def cancel(self) -> None:
        """Cancels from any task of the engine's loop; from another thread, as soon as the loop runs."""
        if self._request.finished:
            return
        if threading.get_ident() == self._engine.thread_id:
            self._engine.cancel(self._request)
        else:
            self._engine.cancel_soon(self._request)

    async def aclose(self) -> None:
        """Cancels if unfinished. Idempotent."""
        self.cancel()

    def text_stream(self) -> AsyncIterator[str]:
        """The text pieces of the deltas, without the rest. Raises `InvalidRequestError` where `n > 1`."""
        if self._request.params.n > 1:
            raise InvalidRequestError(
                "the texts of several completions would run together; iterate the stream, whose deltas have "
                "an index",
                parameter="n",
                value=self._request.params.n,
            )
        return _TextIterator(self)

    def __aiter__(self) -> AsyncIterator[Delta]:
        # A handle of its own, so that `break` drops it even where the caller keeps the stream.
        return _DeltaIterator(self)

    async def __anext__(self) -> Delta:
        request = self._request
        while True:
            delta = request.take()
            if delta is not None:
                return delta
            if request.finished:
                request.raise_error()
                raise StopAsyncIteration
            try:
                await request.wait_delta()
            except BaseException:
                self.cancel()
                raise

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._result().__await__()

    async def _result(self) -> RequestOutput:
        request = self._request
        try:
            await request.wait_finished()
        except BaseException:
            self.cancel()
            raise
        request.raise_error()
        return request.output()

    async def __aenter__(self) -> "GenerationStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        _abandon(self)

    def __repr__(self) -> str:
        state = "finished" if self._request.finished else "running"
        return f"<GenerationStream {self.request_id!r} {state}>"


def _abandon(stream: GenerationStream) -> None:
    # Runs wherever the garbage collector does: in any thread, in the middle of anything.
    if not stream._request.finished:
        stream._engine.cancel_soon(stream._request)


class _DeltaIterator:
    """One `async for` over a stream; ends the request when it is dropped unfinished."""

    __slots__ = ("_stream",)

    def __init__(self, stream: GenerationStream) -> None:
        self._stream = stream

    def __aiter__(self) -> "_DeltaIterator":
        return self

    async def __anext__(self) -> Delta:
        return await self._stream.__anext__()

    def __del__(self) -> None:
        _abandon(self._stream)


class _TextIterator:
    """As `_DeltaIterator`, but gives the non-empty texts."""

    __slots__ = ("_stream",)

    def __init__(self, stream: GenerationStream) -> None:
        self._stream = stream

    def __aiter__(self) -> "_TextIterator":
        return self

    async def __anext__(self) -> str:
        while True:
            delta = await self._stream.__anext__()
            if delta.text:
                return delta.text

    def __del__(self) -> None:
        _abandon(self._stream)
