"""Sleep and wake-up: memory is really given back, and answers are the same afterwards."""

import asyncio
import os
import signal

import msgspec
import psutil
import pytest

from asyncengine import LLM, EngineClosedError, EngineDeadError, InvalidRequestError, OutOfMemoryError
from asyncengine.checkpoint.demo import demo_model
from asyncengine.wire.stages import Woken

from .harness import house

MIB = 1 << 20
WEIGHTS = 185 * MIB  # 135 M of them, of at least 12 bits
PROMPTS = [f"Number {number} is the number of" for number in range(4)]
FIELDS = dict(max_tokens=12, temperature=0, ignore_eos=True)


def resident(llm):
    """Bytes of private memory in all ranks, without the files they have mapped."""
    infos = [psutil.Process(pid).memory_info() for pid in llm._core.workers.pids]
    return sum(info.rss - info.shared for info in infos)


async def answers(llm):
    return [output.outputs[0].token_ids for output in await llm.generate_many(PROMPTS, **FIELDS)]


async def fill_cache(llm, tokens):
    for number in range(tokens // 1000):
        await llm.generate([number + 5] + [7] * 999, max_tokens=1)


@pytest.fixture(scope="module")
def h(demo_gguf):
    with house(
        demo_gguf, dtype="bfloat16", max_model_len=1024, num_threads=1, kv_cache_memory_bytes=96 * MIB
    ) as made:
        yield made


@pytest.mark.parametrize("level", [1, 2])
def test_memory_goes_and_comes_back_and_answers_are_the_same(h, level):
    llm = h.llm

    async def run():
        expected = await answers(llm)
        await fill_cache(llm, 2000)  # 23,040 bytes a token
        before = resident(llm)
        await llm.sleep(level)
        assert llm.is_sleeping and llm.is_healthy
        asleep = resident(llm)
        assert before - asleep > 2000 * 23_040 * 0.95 + (WEIGHTS if level == 2 else 0)
        await llm.sleep(1)  # nothing more to give
        await llm.wake_up()
        await llm.wake_up()
        assert not llm.is_sleeping
        assert await answers(llm) == expected
        # Nothing of before is taken for cached.
        assert (await llm.generate([5] + [7] * 999, max_tokens=1)).num_cached_tokens == 0
        await fill_cache(llm, 2000)
        assert abs(resident(llm) - before) < 30 * MIB

    h.run(run(), 120)


def test_deeper_sleep_from_a_light_one(h):
    async def run():
        expected = await answers(h.llm)
        await h.llm.sleep(1)
        light = resident(h.llm)
        await h.llm.sleep(2)
        assert light - resident(h.llm) > WEIGHTS
        await h.llm.wake_up()
        assert await answers(h.llm) == expected

    h.run(run(), 120)


def test_requests_in_flight_are_finished_and_new_ones_refused(h):
    async def run():
        alone = await h.llm.generate(PROMPTS[0], **FIELDS)
        stream = h.llm.generate(PROMPTS[0], **FIELDS)
        sleeping = asyncio.ensure_future(h.llm.sleep())
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="wake_up"):
            h.llm.generate(PROMPTS[1])
        waking = asyncio.ensure_future(h.llm.wake_up())  # comes after the sleep, however long that takes
        assert (await stream).outputs == alone.outputs
        await sleeping
        await waking
        assert not h.llm.is_sleeping
        await h.llm.sleep()
        with pytest.raises(EngineClosedError, match="wake_up"):
            await h.llm.reset_prefix_cache()
        await h.llm.wake_up()
        assert (await h.llm.generate(PROMPTS[0], **FIELDS)).outputs == alone.outputs

    h.run(run())


def test_cancelled_while_requests_are_awaited(h):
    async def run():
        stream = h.llm.generate(PROMPTS[0], **FIELDS)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(h.llm.sleep(), 0.001)
        assert not h.llm.is_sleeping
        await asyncio.gather(stream, h.llm.generate(PROMPTS[1], **FIELDS))

    h.run(run())


def test_too_little_memory_is_told_and_may_come_back(h, monkeypatch):
    workers = h.llm._core.workers
    commands = []
    real = workers.run_stage

    async def run_stage(name, payload, on_progress=None):
        commands.append(name)
        replies = await real(name, payload, on_progress)
        if commands == ["sleep", "wake_up"]:
            replies[-1] = msgspec.msgpack.encode(Woken("7 bytes were given back, and 3 are free now"))
        return replies

    monkeypatch.setattr(workers, "run_stage", run_stage)

    async def run():
        expected = await answers(h.llm)
        await h.llm.sleep(2)
        with pytest.raises(OutOfMemoryError, match="sleeps on: 7 bytes were given back, and 3 are free"):
            await h.llm.wake_up()
        assert h.llm.is_sleeping and commands == ["sleep", "wake_up", "sleep"]
        await h.llm.wake_up()
        assert await answers(h.llm) == expected

    h.run(run())


def test_several_ranks(demo_gguf):
    with house(demo_gguf, max_model_len=256, tensor_parallel_size=3, num_threads=3) as h:

        async def run():
            expected = await answers(h.llm)
            before = resident(h.llm)
            await h.llm.sleep(2)
            assert before - resident(h.llm) > 75 * MIB  # the file's 4-bit weights
            await h.llm.wake_up()
            assert await answers(h.llm) == expected

        h.run(run())


@pytest.mark.parametrize("level", [0, 3, True, "1", None])
def test_level_is_checked(h, level):
    with pytest.raises(InvalidRequestError, match="must be 1 or 2") as caught:
        h.run(h.llm.sleep(level))
    assert caught.value.parameter == "level"


def test_ends_while_asleep(demo_gguf):
    for ending in ("close", "kill"):
        with house(demo_gguf, max_model_len=256) as h:

            async def run(llm=h.llm, ending=ending):
                await llm.sleep(2)
                if ending == "close":
                    await llm.aclose()
                    with pytest.raises(EngineClosedError):
                        await llm.wake_up()
                    return
                os.kill(llm._core.workers.pids[0], signal.SIGKILL)
                with pytest.raises(EngineDeadError):
                    await llm.wake_up()
                assert not llm.is_healthy

            h.runner.run(run())


@pytest.mark.skipif(not os.path.exists(demo_model()), reason="needs the demo model")
def test_sync():
    with LLM(demo_model(), max_model_len=256) as llm:
        expected = llm.generate(PROMPTS[0], max_tokens=4, temperature=0)[0].outputs
        llm.sleep(level=2)
        assert llm.is_sleeping
        with pytest.raises(InvalidRequestError, match="tags"):
            llm.wake_up(tags=["weights"])
        llm.wake_up()
        assert llm.generate(PROMPTS[0], max_tokens=4, temperature=0)[0].outputs == expected
