"""An engine and the loop it lives on, for the length of a test module; and what must hold after tests."""

import asyncio
import contextlib
import time

from asyncengine import AsyncLLM


class House:
    """Runs coroutines on one loop beside one engine."""

    def __init__(self, model, loop_factory=None, **engine):
        self.runner = asyncio.Runner(loop_factory=loop_factory)
        self.failures = []
        self.runner.get_loop().set_exception_handler(lambda loop, context: self.failures.append(context))
        self.llm = self.runner.run(AsyncLLM.create(model, **engine))

    def run(self, coroutine, timeout=60):
        """Runs to the end; then nothing may be left behind: no request, no block, no loop error."""

        async def bounded():
            return await asyncio.wait_for(coroutine, timeout)

        result = self.runner.run(bounded())
        self.check()
        return result

    def check(self):
        self.runner.run(settle(self.llm))
        assert self.failures == []

    def close(self):
        self.runner.run(self.llm.aclose())
        self.runner.close()


async def settle(llm):
    """Waits until all is quiet, then looks for leaks."""
    await asyncio.wait_for(llm.drain(), 30)
    core = llm._core
    deadline = time.monotonic() + 10
    while core.scheduler.in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    assert core.scheduler.in_flight == 0
    assert core.requests == {}
    core.scheduler.check()
    assert core.scheduler.num_free_blocks == core.scheduler.num_blocks
    assert core.scheduler.num_running == core.scheduler.num_waiting == 0


@contextlib.contextmanager
def house(model, **engine):
    made = House(model, **engine)
    try:
        yield made
    finally:
        made.close()


class Heartbeat:
    """Measures the longest time for which the loop did not come round."""

    def __init__(self, period=0.002):
        self.worst = 0.0
        self._period = period

    async def _beat(self):
        last = time.perf_counter()
        while True:
            await asyncio.sleep(self._period)
            now = time.perf_counter()
            self.worst = max(self.worst, now - last - self._period)
            last = now

    async def __aenter__(self):
        self._task = asyncio.ensure_future(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error):
        self._task.cancel()
