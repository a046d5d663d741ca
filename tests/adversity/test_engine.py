"""The engine under storms, slow readers, kills and repeated lives."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import uvloop

from asyncengine import AsyncLLM, EngineDeadError, QueueFullError

from ..e2e.harness import Heartbeat, House, settle

PROMPT = "Once upon a time, there was"
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
ENGINE = dict(max_model_len=512)
BEAT = 0.050
"""No stall of the caller's loop may be longer, in seconds."""


async def answer(llm, **fields):
    return await llm.generate(PROMPT, **{"max_tokens": 8, "temperature": 0} | fields)


@pytest.mark.parametrize("factory", LOOPS, ids=["asyncio", "uvloop"])
def test_cancel_storm(demo_gguf, factory):
    """1,000 streams, cancelled in every way at random moments; no block leaks and the engine serves."""
    house = House(demo_gguf, factory, **ENGINE, max_num_seqs=64)
    rng = random.Random(7)

    async def one(number):
        await asyncio.sleep(rng.random() * 6)
        prompt = [rng.randrange(49152) for _ in range(rng.choice([3, 40, 300]))]
        way = number % 6
        stream = house.llm.generate(
            prompt, n=rng.choice([1, 1, 1, 3]), max_tokens=rng.choice([5, 100]), ignore_eos=True
        )
        delay = rng.choice([0, 0, 0.01, 0.1, 1.0])
        if way == 0:
            await asyncio.sleep(delay)
            stream.cancel()
            await stream
        elif way == 1:
            async for _ in stream:
                if rng.random() < 0.5:
                    break
        elif way == 2:
            task = asyncio.ensure_future(consume(stream))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif way == 3:
            await asyncio.sleep(delay)
            del stream
        elif way == 4:
            async with stream:
                await asyncio.sleep(delay)
        else:
            try:
                async with asyncio.timeout(delay):
                    await stream
            except TimeoutError:
                pass

    async def run():
        before = await answer(house.llm)
        await asyncio.gather(*[one(number) for number in range(1000)])
        gc.collect()
        await settle(house.llm)
        after = await answer(house.llm)
        assert before.outputs[0].token_ids == after.outputs[0].token_ids

    try:
        house.run(run(), timeout=150)
    finally:
        house.close()


async def consume(stream):
    return [delta async for delta in stream]


def test_slow_consumers_do_not_hold_up_others(demo_gguf):
    house = House(demo_gguf, **ENGINE)

    async def run():
        slow = [house.llm.generate(PROMPT, max_tokens=400, ignore_eos=True, seed=i) for i in range(8)]
        for stream in slow:
            await anext(stream)
        quick = await asyncio.wait_for(answer(house.llm), 10)
        assert len(quick.outputs[0].token_ids) == 8
        await house.llm.drain()
        for stream in slow:
            rest = await consume(stream)
            assert len(rest) == 1
            assert len(stream.output.outputs[0].token_ids) == 400

    try:
        house.run(run(), timeout=100)
    finally:
        house.close()


def test_blocked_host_loop_does_not_stop_the_workers(demo_gguf):
    """A host that blocks its loop again and again still gets every token."""
    house = House(demo_gguf, **ENGINE)

    async def run():
        stream = house.llm.generate(PROMPT, max_tokens=60, ignore_eos=True, temperature=0)
        ids = []
        async for delta in stream:
            ids += delta.token_ids
            time.sleep(0.05)
        calm = await house.llm.generate(PROMPT, max_tokens=60, ignore_eos=True, temperature=0)
        assert ids == calm.outputs[0].token_ids

    try:
        house.run(run())
    finally:
        house.close()


@pytest.mark.parametrize("factory", LOOPS, ids=["asyncio", "uvloop"])
def test_heartbeat_through_a_whole_life(demo_gguf, factory):
    async def run():
        async with Heartbeat() as beat:
            llm = await AsyncLLM.create(demo_gguf, **ENGINE)
            created = beat.worst
            streams = [llm.generate(PROMPT, max_tokens=30, ignore_eos=True) for _ in range(32)]
            streams.append(llm.chat([{"role": "user", "content": "Hello " * 50}], max_tokens=20))
            streams += [llm.generate("word " * 60, max_tokens=30) for _ in range(8)]
            await asyncio.gather(*[consume(stream) for stream in streams])
            generated = beat.worst
            long = llm.generate("word " * 200_000, max_tokens=1)
            await asyncio.sleep(0.3)
            long.cancel()
            for stream in [llm.generate(PROMPT, max_tokens=300, ignore_eos=True) for _ in range(32)]:
                stream.cancel()
            cancelled = beat.worst
            await llm.aclose()
        return created, generated, cancelled, beat.worst

    # Other programs on the machine stall the loop too, but not in the same way every time.
    tries = []
    for _ in range(3):
        with asyncio.Runner(loop_factory=factory) as runner:
            tries.append(runner.run(run()))
        if tries[-1][-1] <= BEAT:
            return
    raise AssertionError(f"worst stalls so far after create, generate, cancel, close: {tries}")


def test_two_engines_in_one_process(demo_gguf):
    async def run():
        one, two = await asyncio.gather(
            AsyncLLM.create(demo_gguf, **ENGINE), AsyncLLM.create(demo_gguf, **ENGINE)
        )
        first, second = await asyncio.gather(answer(one), answer(two))
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        await one.aclose()
        third = await answer(two)
        assert third.outputs[0].token_ids == first.outputs[0].token_ids
        await two.aclose()

    asyncio.run(run())


LIVES = """
import asyncio, ctypes, gc, sys, threading
import psutil
from asyncengine import AsyncLLM

me = psutil.Process()

async def live():
    async with await AsyncLLM.create(sys.argv[1], max_model_len=512) as llm:
        await llm.generate("Once upon a time", max_tokens=8)

def state():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back is the allocator's affair
    assert me.children() == []
    return me.num_fds(), threading.active_count(), me.memory_info().rss

async def run():
    for _ in range(3):
        await live()
    print(*state())
    for _ in range(10):
        await live()
    print(*state())

asyncio.run(run())
"""


def test_ten_lives_leave_nothing(demo_gguf):
    """In a process of its own: memory that other tests have churned says nothing.

    An engine takes some 50 MiB here, so a single one that stays is seen.
    """
    before = set(os.listdir("/dev/shm"))
    done = subprocess.run(
        [sys.executable, "-c", LIVES, demo_gguf], capture_output=True, text=True, check=True
    )
    first, last = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert last[:2] == first[:2]
    assert last[2] - first[2] < 24 << 20
    assert set(os.listdir("/dev/shm")) <= before


def test_worker_killed(demo_gguf):
    """Everybody who waits gets the cause; the engine says that it is dead; closing still works."""

    async def run():
        llm = await AsyncLLM.create(demo_gguf, **ENGINE)
        stream = llm.generate(PROMPT, max_tokens=400, ignore_eos=True)
        await anext(stream)
        task = asyncio.ensure_future(consume(stream))
        waiting = asyncio.ensure_future(answer(llm, max_tokens=400, ignore_eos=True))
        await asyncio.sleep(0.05)
        os.kill(llm._core.workers.pids[0], signal.SIGKILL)
        for waiter in (task, waiting):
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await asyncio.wait_for(waiter, 10)
        assert not llm.is_healthy
        with pytest.raises(EngineDeadError):
            llm.generate(PROMPT)
        await llm.aclose()
        assert psutil.Process().children() == []

    asyncio.run(run())


def test_parent_killed(demo_gguf):
    """The workers of a host that is killed with -9 are gone within seconds."""
    code = f"""
import asyncio, asyncengine
async def main():
    llm = await asyncengine.AsyncLLM.create({demo_gguf!r}, max_model_len=512)
    print(*llm._core.workers.pids, flush=True)
    await llm.generate("x", max_tokens=100000, ignore_eos=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""
    before = set(os.listdir("/dev/shm"))
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in host.stdout.readline().split()]
    assert pids and all(psutil.pid_exists(pid) for pid in pids)
    host.kill()
    host.wait()
    host.stdout.close()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)
    assert set(os.listdir("/dev/shm")) <= before


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_off_the_main_thread(demo_gguf):
    results = []

    def other():
        async def run():
            async with await AsyncLLM.create(demo_gguf, **ENGINE) as llm:
                results.append(await answer(llm))

        asyncio.run(run())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(results[0].outputs[0].token_ids) == 8


def test_create_cancelled_or_failed_leaves_nothing(demo_gguf):
    async def run():
        for delay in (0.01, 0.1, 0.3, 0.6):
            task = asyncio.ensure_future(AsyncLLM.create(demo_gguf, **ENGINE))
            await asyncio.sleep(delay)
            task.cancel()
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(result, AsyncLLM):
                await result.aclose()
        assert psutil.Process().children() == []

    asyncio.run(run())


def test_forgotten_engine_is_collected(demo_gguf):
    async def run():
        llm = await AsyncLLM.create(demo_gguf, **ENGINE)
        await answer(llm)
        pids = llm._core.workers.pids
        with pytest.warns(ResourceWarning):
            del llm
            gc.collect()
        assert not any(alive(pid) for pid in pids)

    asyncio.run(run())


def test_full_queue_under_load(demo_gguf):
    house = House(demo_gguf, **ENGINE, max_num_seqs=4, max_queued_requests=16)

    async def one(number):
        while True:
            try:
                return await answer(house.llm, max_tokens=4)
            except QueueFullError:
                await asyncio.sleep(0.02)

    async def run():
        outputs = await asyncio.gather(*[one(number) for number in range(100)])
        assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1

    try:
        house.run(run())
    finally:
        house.close()
