"""Typed endpoints over the shared-memory rings, two for the host and two for a worker.

The plan ring carries PLAN and COMMAND records from the host to every rank; each rank has a reply ring
of its own that carries RESULT and REPLY records back. PLAN and RESULT bytes pass through untouched.

The host never waits for space. Its loop keeps few plans in flight, commands are sent one at a time
(stages) or last (Shutdown), so a full ring means that a worker has stopped reading; queueing behind it
would only hide that, and the caller is told instead. A worker does wait: its host may be busy.
"""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from asyncengine._fast import ring

from .plan import Command, Fault, Kind, LogRecord, Reply

if TYPE_CHECKING:  # a worker has no use for asyncio, which takes a while to load
    from asyncio import AbstractEventLoop

__all__ = ["PlanReader", "PlanWriter", "ReplyReader", "ReplyWriter", "WorkerArgs"]

MAX_DRAIN = 32
"""Records taken in one wake of the loop, so that a worker that floods its log cannot hold the loop."""
MAX_TEXT = 16_384
"""Characters of a fault's or log record's text that are sent."""

_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Command).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class WorkerArgs(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's command line, as JSON: who it is and which descriptors it has inherited."""

    rank: int
    world_size: int
    parent: int
    """Process id of the host."""
    parent_signal: bool
    """Whether the kernel may tie the worker's life to the thread that started it."""
    handler: str
    """`module:Class` of what runs stages and steps."""
    log_level: int
    plans: int
    replies: int
    bell: int
    """Eventfd that wakes the host for this rank's replies."""
    lifeline: int
    """Socket to the host; end of file means that the host is gone."""
    fds: dict[str, int]
    """Further descriptors, for the handler."""


class PlanWriter:
    """The host's end of the plan ring, which it makes and owns; `capacity` in bytes.

    Raises OSError where descriptors or memory are refused.
    """

    def __init__(self, capacity: int, num_ranks: int) -> None:
        self.fd = ring.create(capacity, num_ranks)
        """What a worker inherits."""
        self._ring = ring.RingWriter(self.fd)

    @property
    def max_record(self) -> int:
        """Most bytes of one plan, header and payload together."""
        return self._ring.max_record

    def plan(self, header: bytes | memoryview, payload: bytes | memoryview) -> bool:
        """Sends a plan to every rank; False, with nothing sent, where a rank has not made room."""
        return self._ring.try_write2(Kind.PLAN, header, payload)

    def command(self, command: Command) -> bool:
        """Sends a command to every rank; False as in `plan`."""
        return self._ring.try_write(Kind.COMMAND, _encode(command))

    def close(self) -> None:
        """Gives the ring back. Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._ring.close()


class PlanReader:
    """A worker's end of the plan ring."""

    def __init__(self, fd: int, rank: int, *, spin_us: float) -> None:
        self._ring = ring.RingReader(fd, rank)
        self._spin_us = spin_us

    def read(self) -> bytes | Command:
        """Waits for the next plan (bytes) or command."""
        while (record := self._ring.read(None, self._spin_us)) is None:
            pass
        kind, data = record
        return data if kind == Kind.PLAN else _decode_command(data)


class ReplyWriter:
    """A worker's end of its reply ring; any thread may write."""

    def __init__(self, fd: int, bell: int) -> None:
        self._ring = ring.RingWriter(fd)
        self._ring.attach_eventfd(0, bell)
        self._lock = threading.Lock()

    def result(self, data: bytes) -> None:
        """Sends the result of a plan, waiting for room. Raises ValueError where it can never fit."""
        with self._lock:
            self._ring.write(Kind.RESULT, data)

    def reply(self, reply: Reply) -> None:
        """Sends a reply, waiting for room; long texts are cut so that a fault always gets through."""
        match reply:
            case Fault(stage, error, message, traceback):
                reply = Fault(stage, error, message[:MAX_TEXT], traceback[-MAX_TEXT:])
            case LogRecord(name, level, message):
                reply = LogRecord(name, level, message[:MAX_TEXT])
        data = _encode(reply)
        with self._lock:
            self._ring.write(Kind.REPLY, data)


class ReplyReader:
    """The host's end of one rank's reply ring, which it makes and owns; drained by callbacks of the loop.

    `capacity` in bytes. Raises OSError where descriptors or memory are refused.
    """

    def __init__(self, capacity: int) -> None:
        self.fd = ring.create(capacity, 1)
        self._ring = ring.RingReader(self.fd, 0)
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """What a worker inherits, besides `fd`."""
        self._loop: AbstractEventLoop | None = None

    def start(
        self,
        loop: "AbstractEventLoop",
        on_result: Callable[[bytes], None],
        on_reply: Callable[[Reply], None],
    ) -> None:
        """Calls back on `loop` for every record from now on, in order."""
        self._on_result = on_result
        self._on_reply = on_reply
        self._loop = loop
        loop.add_reader(self.bell, self._wake)
        loop.call_soon(self.drain)

    def _wake(self) -> None:
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            pass
        self.drain()

    def drain(self) -> bool:
        """Handles what has come. False where more is left, for which the loop will call again."""
        if self._loop is None:
            return True
        again = True
        try:
            for _ in range(MAX_DRAIN):
                record = self._ring.try_read()
                if record is None:
                    again = self._ring.arm()
                    if not again:
                        break
                    continue
                kind, data = record
                if kind == Kind.RESULT:
                    self._on_result(data)
                else:
                    self._on_reply(_decode_reply(data))
                if self._loop is None:  # closed by the callback
                    return True
            return not again
        finally:
            # Also after an error in a callback, which the loop reports: the rest must still be read.
            if again and self._loop is not None:
                self._loop.call_soon(self.drain)

    def close(self) -> None:
        """Stops the callbacks and gives ring and eventfd back. Harmless twice."""
        if self.fd < 0:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self.bell)
        self._loop = None
        self._on_result = self._on_reply = _ignore
        for fd in (self.fd, self.bell):
            os.close(fd)
        self.fd = self.bell = -1
        self._ring.close()


def _ignore(_: object) -> None:
    pass
