"""Worker groups for tests, and what is left of their processes."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from asyncengine.engine.supervisor import WorkerGroup
from asyncengine.errors import EngineDeadError

HERE = str(Path(__file__).parent)
FAKE = "fake_worker:FakeRunner"


class Owner:
    """What an engine is to its group."""

    def __init__(self) -> None:
        self.results: list[bytes] = []
        self.deaths: list[EngineDeadError] = []
        self.news = asyncio.Event()

    def on_result(self, data: bytes) -> None:
        self.results.append(data)
        self.news.set()

    def on_death(self, error: EngineDeadError) -> None:
        self.deaths.append(error)
        self.news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.news.clear()
            await self.news.wait()

    async def start(self, num_ranks: int = 1, **options: Any) -> WorkerGroup:
        options.setdefault("handler", FAKE)
        return await WorkerGroup.start(num_ranks, on_result=self.on_result, on_death=self.on_death, **options)


def alive(pids: list[int]) -> list[int]:
    """Those that still are processes, zombies included."""
    return [pid for pid in pids if psutil.pid_exists(pid)]


def wait_gone(pids: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    ):
        assert time.monotonic() < end, f"processes {pids} are still there"
        time.sleep(0.01)
