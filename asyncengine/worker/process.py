"""The life of a rank's process: born with its descriptors, serves stages and plans, dies with its host.

A rank leaves nothing behind and needs no cleaning up, so it may end at any instruction: in order on
`Shutdown`, with a `Fault` after a defect, or at once when the host is gone. The host's end is noticed
by three independent means: the kernel's parent-death signal, end of file on the lifeline socket, and a
changed parent id (a process forked off the host may keep the socket open).
"""

import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

import msgspec

from .. import errors
from ..wire.channel import PlanReader, ReplyWriter, WorkerArgs
from ..wire.plan import Fault, LogRecord, Progress, Shutdown, StageCommand, StageDone

__all__ = ["Handler", "main"]

SPIN_US = 30.0
"""How long a rank spins for the next plan before it sleeps, where it has a core to itself."""
PARENT_CHECK_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1


class Handler(Protocol):
    """What a rank runs; made as `Handler(rank, world_size, fds)`."""

    reply: Callable[[bytes], None]
    """Set before the first stage: sends a result from whatever thread has it, in the order of the plans."""

    def run_stage(self, stage: str, payload: bytes, progress: Callable[[int, int, str], None]) -> bytes:
        """Runs one stage of the start; `progress` takes done, total, unit."""
        ...

    def step(self, plan: bytes) -> bytes | None:
        """Runs one plan; the result, or None where it goes to `reply` later, or the rank reports nothing."""
        ...

    def close(self) -> None:
        """Called once, before an orderly exit."""
        ...


def main(text: str) -> None:
    """Runs the rank described by `text` (a `WorkerArgs` in JSON) until it is told to leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the host's to handle
    args = msgspec.json.decode(text, type=WorkerArgs)
    for fd in (args.plans, args.replies, args.bell, args.lifeline, *args.fds.values()):
        os.set_inheritable(fd, False)
    _die_with_host(args)
    faulthandler.enable()
    replies = ReplyWriter(args.replies, args.bell)
    _forward_logs(replies, args.log_level)
    try:
        module, _, name = args.handler.partition(":")
        handler: Handler = getattr(importlib.import_module(module), name)(
            args.rank, args.world_size, args.fds
        )
    except Exception as error:
        _leave(replies, "start", error)
    handler.reply = replies.result
    threading.excepthook = lambda args: _leave(replies, "step", args.exc_value)
    alone = len(os.sched_getaffinity(0)) > args.world_size
    _serve(handler, PlanReader(args.plans, args.rank, spin_us=SPIN_US if alone else 0.0), replies)


def _serve(handler: Handler, plans: PlanReader, replies: ReplyWriter) -> None:
    while True:
        match plans.read():
            case bytes(plan):
                try:
                    result = handler.step(plan)
                    if result is not None:
                        replies.result(result)
                except Exception as error:
                    _leave(replies, "step", error)
            case StageCommand(stage, payload):
                try:
                    done = handler.run_stage(stage, payload, _progress_of(stage, replies))
                    replies.reply(StageDone(stage, done))
                except Exception as error:
                    _leave(replies, stage, error)
            case Shutdown():
                handler.close()
                return


def _progress_of(stage: str, replies: ReplyWriter) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, unit: str) -> None:
        replies.reply(Progress(stage, done, total, unit))

    return progress


def _leave(replies: ReplyWriter, stage: str, error: BaseException | None) -> None:
    """Reports a fault and ends the process, without the exit handlers of a state that is broken."""
    known = [c.__name__ for c in type(error).__mro__ if c.__name__ in errors.__all__]
    if isinstance(error, MemoryError):
        known.append("OutOfMemoryError")
    message = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error))
    replies.reply(Fault(stage, known[0] if known else "", message, text))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _die_with_host(args: WorkerArgs) -> None:
    if args.parent_signal:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    lifeline = socket.socket(fileno=args.lifeline)
    # Each end of the lifeline must be held by one process alone, or its closing says nothing.
    os.register_at_fork(after_in_child=lifeline.close)
    lifeline.settimeout(PARENT_CHECK_SECONDS)

    def watch() -> None:
        # The first look at the parent also covers a host that died before prctl.
        while os.getppid() == args.parent:
            try:
                if not lifeline.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


class _ForwardLogs(logging.Handler):
    def __init__(self, replies: ReplyWriter) -> None:
        super().__init__()
        self._replies = replies

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._replies.reply(LogRecord(record.name, record.levelno, self.format(record)))
        except Exception:
            self.handleError(record)


def _forward_logs(replies: ReplyWriter, level: int) -> None:
    """Sends the engine's log lines at `level`, and anybody else's warnings, to the host's loggers."""
    logging.getLogger().addHandler(_ForwardLogs(replies))
    logging.getLogger("asyncengine").setLevel(level)
