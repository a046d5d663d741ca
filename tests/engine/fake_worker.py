"""A rank without a model, for the supervisor's tests: does what a stage's name says."""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from asyncengine.errors import ConfigError


class FakeRunner:
    def __init__(self, rank: int, world_size: int, fds: dict[str, int]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.fds = fds

    def run_stage(self, stage: str, payload: bytes, progress: Callable[[int, int, str], None]) -> bytes:
        last = self.rank == self.world_size - 1
        match stage:
            case "echo":
                for done in range(3):
                    progress(done + 1, 3, "steps")
                return b"%d:" % self.rank + payload
            case "imports":
                return repr((sorted(sys.modules), sys.path)).encode()
            case "fd":
                return os.pread(self.fds["file"], 100, 0)
            case "log":
                logging.getLogger("asyncengine.fake").info("details %d", 7)
                logging.getLogger("elsewhere").warning("watch out")
                logging.getLogger("elsewhere").info("not this")
            case "flood":
                for i in range(int(payload)):
                    logging.getLogger("asyncengine.flood").warning("line %d", i)
            case "config error" if last:
                raise ConfigError("max_model_len=0 is too small", parameter="max_model_len", value=0)
            case "memory error":
                raise MemoryError("Unable to allocate 5 TiB")
            case "defect":
                return b"%d" % (1 // 0)
            case "exit" if last:
                os._exit(3)
            case "exit later" if last:
                threading.Timer(0.05, os._exit, [4]).start()
            case "kill" if last:
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "flood and fail":
                for i in range(1000):
                    logging.getLogger("asyncengine.flood").warning("line %d", i)
                raise RuntimeError("the last word")
            case "sleep" | "config error" | "exit" | "kill":
                time.sleep(60)
            case "hang":  # with the GIL held, deaf to SIGTERM
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                progress(0, 1, "hanging")
                ctypes.PyDLL(None).sleep(60)
        return b""

    def step(self, plan: bytes) -> bytes | None:
        match plan:
            case b"defect":
                raise KeyError("no such block")
            case b"kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"sleep":
                time.sleep(60)
        return plan if self.rank == 0 else None

    def close(self) -> None:
        pass


class NoRunner:
    def __init__(self, rank: int, world_size: int, fds: dict[str, int]) -> None:
        raise RuntimeError("cannot be made")
