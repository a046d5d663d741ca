"""The worker processes of one engine: starting, feeding, watching and ending them.

Everything happens in callbacks of the caller's event loop: no thread, no signal handler, no child
watcher. A rank's end shows as end of file on its lifeline socket; its last words are read before its
exit code is looked at, so that an error names the cause and not the symptom. The ranks of a group live
and die together: the first failure ends all, and whoever owns the group starts a new one.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import msgspec

from .. import errors
from ..errors import AsyncEngineError, EngineClosedError, EngineDeadError
from ..wire.channel import PlanWriter, ReplyReader, WorkerArgs
from ..wire.plan import Fault, LogRecord, Progress, Reply, Shutdown, StageCommand, StageDone

__all__ = ["WorkerGroup"]

RING_CAPACITY = 4 << 20
RUNNER = "asyncengine.worker.runner:Runner"

REAP_POLL_SECONDS = 0.005
REAP_SECONDS = 1.0
"""How long a rank that has closed its lifeline may take to exit before it is killed."""
TERMINATE_SECONDS = 1.0
KILL_SECONDS = 5.0

OnProgress = Callable[[int, Progress], None]
"""Called with the rank and what it reports."""


@dataclass(slots=True)
class _Rank:
    index: int
    process: subprocess.Popen[bytes]
    lifeline: socket.socket
    replies: ReplyReader
    exited: asyncio.Future[int]


@dataclass(slots=True)
class _Stage:
    name: str
    on_progress: OnProgress | None
    results: dict[int, bytes]
    done: asyncio.Future[list[bytes]]


class WorkerGroup:
    """`num_ranks` worker processes and the rings to them. Made by `start`; belongs to that event loop."""

    def __init__(
        self,
        plans: PlanWriter,
        on_result: Callable[[bytes], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = os.getpid()
        self._on_result = on_result
        self._on_death = on_death
        self._plans = plans
        self._ranks: list[_Rank] = []
        self._stage: _Stage | None = None
        self._error: AsyncEngineError | None = None
        """Why the group cannot be used any more."""
        self._stopping: asyncio.Task[None] | None = None
        self._closed = False

    # ---- starting

    @classmethod
    async def start(
        cls,
        num_ranks: int,
        *,
        on_result: Callable[[bytes], None],
        on_death: Callable[[EngineDeadError], None],
        ring_capacity: int = RING_CAPACITY,
        extra_fds: Mapping[str, int] | None = None,
        handler: str = RUNNER,
    ) -> "WorkerGroup":
        """Starts the processes and returns at once; whether they work shows in the first stage.

        `on_result` gets every RESULT record. `on_death` is called once, if a rank ends or reports a
        fault while no stage is running (during a stage, `run_stage` raises instead). `ring_capacity`
        is in bytes, per ring. `extra_fds` are inherited by every rank and given to its handler; they
        stay the caller's. Raises EngineDeadError where a process cannot be started.
        """
        try:
            group = cls(PlanWriter(ring_capacity, num_ranks), on_result, on_death)
        except OSError as error:
            raise EngineDeadError(f"cannot make the ring to the workers: {error}") from error
        try:
            for index in range(num_ranks):
                group._spawn(index, num_ranks, ring_capacity, dict(extra_fds or {}), handler)
                await asyncio.sleep(0)  # a spawn takes milliseconds: let others run in between
        except OSError as error:
            group.kill()
            raise EngineDeadError(f"cannot start a worker process ({sys.executable}): {error}") from error
        except BaseException:
            group.kill()
            raise
        return group

    def _spawn(
        self, index: int, world_size: int, ring_capacity: int, fds: dict[str, int], handler: str
    ) -> None:
        with ExitStack() as undo:
            replies = ReplyReader(ring_capacity)
            undo.callback(replies.close)
            lifeline, theirs = socket.socketpair()
            undo.callback(lifeline.close)
            lifeline.setblocking(False)
            with theirs:
                process = _start_process(
                    WorkerArgs(
                        rank=index,
                        world_size=world_size,
                        parent=os.getpid(),
                        # The kernel ties that signal to the spawning thread, and only the main thread
                        # is sure to live as long as the process.
                        parent_signal=threading.current_thread() is threading.main_thread(),
                        handler=handler,
                        log_level=logging.getLogger("asyncengine").getEffectiveLevel(),
                        plans=self._plans.fd,
                        replies=replies.fd,
                        bell=replies.bell,
                        lifeline=theirs.fileno(),
                        fds=fds,
                    )
                )
            undo.pop_all()
        rank = _Rank(index, process, lifeline, replies, self._loop.create_future())
        self._ranks.append(rank)
        self._loop.add_reader(lifeline.fileno(), self._on_lifeline, rank)
        replies.start(self._loop, self._on_result, partial(self._on_reply, index))

    # ---- using

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [rank.process.pid for rank in self._ranks]

    @property
    def max_plan(self) -> int:
        """Most bytes of one plan, header and payload together."""
        return self._plans.max_record

    def send_plan(self, header: bytes | memoryview, payload: bytes | memoryview = b"") -> bool:
        """Sends one plan to every rank; never waits.

        False, with nothing sent, where a rank is a whole ring behind. Raises ValueError beyond
        `max_plan`, and what has ended the group where it cannot be used any more.
        """
        if self._error is not None:
            raise self._error
        return self._plans.plan(header, payload)

    async def run_stage(
        self, name: str, payload: bytes, on_progress: OnProgress | None = None
    ) -> list[bytes]:
        """Runs one stage of the start on every rank at once; the results, by rank.

        Raises the error that a rank reports, by its class in `asyncengine.errors`, with the stage and
        (among several) the rank in the message and the worker's traceback as a note; EngineDeadError
        for a defect or where a rank's process ends. After an error or a cancellation only `stop` is
        left.
        """
        if self._error is not None:
            raise self._error
        if self._stage is not None:
            raise RuntimeError(f"stage {self._stage.name!r} is still running")
        if not self._plans.command(StageCommand(name, payload)):
            raise EngineDeadError(f"stage {name!r} cannot begin: the workers have stopped reading")
        self._stage = _Stage(name, on_progress, {}, self._loop.create_future())
        try:
            return await self._stage.done
        except asyncio.CancelledError:
            self._settle(EngineClosedError(f"stage {name!r} was cancelled"))
            raise
        finally:
            self._stage = None

    # ---- ending

    async def stop(self, timeout: float = 5.0) -> None:
        """Ends all ranks and gives everything back: asks, after `timeout` seconds terminates, then kills.

        May be called at any time and any number of times; a cancelled call leaves the work going on.
        """
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._stop(timeout))
        await asyncio.shield(self._stopping)

    async def _stop(self, timeout: float) -> None:
        try:
            if not self._closed and self._ranks:
                asked = self._error is None and self._plans.command(Shutdown())
                self._settle(EngineClosedError("the workers were stopped"))
                await self._exits(timeout if asked else 0.0)
                for signum, patience in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
                    for rank in self._ranks:
                        if not rank.exited.done():
                            rank.process.send_signal(signum)
                    await self._exits(patience)
        finally:
            self.kill()

    async def _exits(self, timeout: float) -> None:
        await asyncio.wait([rank.exited for rank in self._ranks], timeout=timeout)

    def kill(self) -> None:
        """Kills all ranks at once and gives everything back; for finalizers, from any thread.

        Does nothing in a process forked from the owner's.
        """
        if self._closed or os.getpid() != self._owner:
            return
        if self._error is None:
            self._error = EngineClosedError("the workers were killed")
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(REAP_SECONDS)
        # The loop's tables may only be changed by its thread, or by anyone while nobody runs it.
        if self._loop.is_running() and self._loop is not _running_loop():
            self._loop.call_soon_threadsafe(self._close)
        else:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        open_loop = not self._loop.is_closed()
        if self._error is not None and open_loop:
            self._settle(self._error)
        for rank in self._ranks:
            if open_loop:
                self._loop.remove_reader(rank.lifeline.fileno())
            rank.lifeline.close()
            rank.replies.close()
        self._plans.close()
        # The callbacks lead back to the engine: without them its memory goes with its last user.
        self._on_result = self._on_death = _ignore

    # ---- watching

    def _on_reply(self, index: int, reply: Reply) -> None:
        stage = self._stage
        match reply:
            case LogRecord(name, level, message):
                where = f"[rank {index}] " if len(self._ranks) > 1 else ""
                logging.getLogger(name).log(level, "%s%s", where, message)
            case Progress():
                if stage is not None and stage.on_progress is not None:
                    stage.on_progress(index, reply)
            case StageDone(_, payload):
                if stage is not None and not stage.done.done():
                    stage.results[index] = payload
                    if len(stage.results) == len(self._ranks):
                        stage.done.set_result([stage.results[i] for i in range(len(self._ranks))])
            case Fault(name, error, message, traceback):
                kind: type[AsyncEngineError] = EngineDeadError
                if error in errors.__all__:
                    kind = getattr(errors, error)
                self._fail(kind, f"stage {name!r} failed{self._on(index)}: {message}", traceback)

    def _on_lifeline(self, rank: _Rank) -> None:
        try:
            if rank.lifeline.recv(1):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._loop.remove_reader(rank.lifeline.fileno())
        self._reap(rank, self._loop.time() + REAP_SECONDS)

    def _reap(self, rank: _Rank, deadline: float) -> None:
        if self._closed:
            return
        told_all = rank.replies.drain()
        if rank.process.poll() is None and self._loop.time() > deadline:
            rank.process.kill()
        if rank.process.returncode is None or not told_all:
            self._loop.call_later(REAP_POLL_SECONDS, self._reap, rank, deadline)
            return
        rank.exited.set_result(rank.process.returncode)
        during = f" during stage {self._stage.name!r}" if self._stage is not None else ""
        self._fail(
            EngineDeadError,
            f"the worker process{self._on(rank.index)} (pid {rank.process.pid}) "
            f"{_describe(rank.process.returncode)}{during}",
        )

    def _on(self, index: int) -> str:
        return f" on rank {index} of {len(self._ranks)}" if len(self._ranks) > 1 else ""

    def _fail(self, kind: type[AsyncEngineError], message: str, traceback: str = "") -> None:
        """The group is dead: ends all ranks, and tells the stage's waiter or else the owner."""
        if self._error is not None:
            return
        staged = self._stage is not None and not self._stage.done.done()
        error = kind(message) if staged else EngineDeadError(message)
        if traceback:
            error.add_note(f"In the worker:\n{traceback}")
        self._settle(error)
        for rank in self._ranks:
            rank.process.kill()
        if not staged and isinstance(error, EngineDeadError):
            self._on_death(error)

    def _settle(self, error: AsyncEngineError) -> None:
        """From now on the group cannot be used, for this reason; nobody is left waiting."""
        if self._error is None:
            self._error = error
        if self._stage is not None and not self._stage.done.done():
            self._stage.done.set_exception(self._error)


def _ignore(_: object) -> None:
    pass


def _start_process(args: WorkerArgs) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise EngineDeadError(
            "cannot start a worker: sys.executable is empty; set it to the Python interpreter's path"
        )
    # The worker finds what the host finds, also in a checkout or a notebook's directory.
    path = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)]
    command = [sys.executable, "-P", "-m", "asyncengine.worker", msgspec.json.encode(args).decode()]
    # Blocked signals stay blocked across exec, so Ctrl-C cannot hit a worker that does not ignore it yet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            pass_fds=(args.plans, args.replies, args.bell, args.lifeline, *args.fds.values()),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if code == -signal.SIGKILL:
        return f"was killed by {name}: by hand, or by the kernel for want of memory (see its log)"
    return f"was killed by {name}"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
