"""Worker groups with a fake runner: stages, plans, every way to die, and nothing left afterwards."""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import uvloop

from asyncengine.engine.supervisor import WorkerGroup
from asyncengine.errors import ConfigError, EngineClosedError, EngineDeadError, OutOfMemoryError
from asyncengine.wire.plan import Progress

from .groups import Owner, alive

T = TypeVar("T")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[T]], T]:
    """Runs a coroutine on either loop and fails if anything went to the loop's exception handler."""

    def run_on_loop(main: Any) -> Any:
        unhandled: list[dict[str, Any]] = []
        with asyncio.Runner(
            loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None
        ) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            result = runner.run(asyncio.wait_for(main, 60))
            gc.collect()
        assert unhandled == []
        return result

    return run_on_loop


def queued() -> float:
    """Seconds this thread has stood in the kernel's run queue: other programs' doing, not ours."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:  # a kernel that does not tell
        return 0.0


@contextmanager
def heartbeat() -> Iterator[list[float]]:
    """Seconds between turns of a task that only wants to run, less what the machine's load takes."""
    gaps: list[float] = []

    async def beat() -> None:
        last, waited = time.perf_counter(), queued()
        while True:
            await asyncio.sleep(0.001)
            now, then = time.perf_counter(), queued()
            gaps.append((now - last) - (then - waited))
            last, waited = now, then

    task = asyncio.get_running_loop().create_task(beat())
    try:
        yield gaps
    finally:
        task.cancel()


async def keeps_turning(attempt: Callable[[], Awaitable[object]]) -> int:
    """How many attempts it took until one left the loop no 50 ms without a turn: at most four, since what
    another guest of the machine takes shows in no counter, and a spawn waits for the child's first slice."""
    worst: list[float] = []
    while not worst or worst[-1] >= 0.05:
        assert len(worst) < 4, f"the loop stood still for {worst} seconds"
        with heartbeat() as gaps:
            await attempt()
        worst.append(max(gaps))
    return len(worst)


# ---- a good life


def test_stages_plans_and_stop(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        owner = Owner()
        progress: list[tuple[int, Progress]] = []
        group = await owner.start(3)
        results = await group.run_stage("echo", b"x", lambda rank, p: progress.append((rank, p)))
        assert results == [b"0:x", b"1:x", b"2:x"]
        for rank in range(3):
            mine = [p for r, p in progress if r == rank]
            assert mine == [Progress("echo", done, 3, "steps") for done in (1, 2, 3)]
        plans = [b"%d" % number + b"." * (number * 7 % 300) for number in range(3000)]
        for number, plan in enumerate(plans):
            assert group.send_plan(plan[:4], memoryview(plan)[4:])
            if number % 100 == 99:
                await owner.until(lambda n=number: len(owner.results) == n + 1)  # type: ignore[misc]
        assert owner.results == plans
        pids = group.pids
        assert len(set(pids)) == 3 == len(alive(pids))
        await asyncio.gather(group.stop(), group.stop())
        await group.stop()
        assert alive(pids) == []
        assert owner.deaths == []
        with pytest.raises(EngineClosedError):
            group.send_plan(b"")
        with pytest.raises(EngineClosedError):
            await group.run_stage("echo", b"")

    run(main())


def test_the_loop_keeps_turning(run: Callable[[Any], Any]) -> None:
    async def life() -> None:
        owner = Owner()
        group = await owner.start(4)
        await group.run_stage("echo", b"")
        group.send_plan(b"")
        await owner.until(lambda: bool(owner.results))
        await group.stop()

    run(keeps_turning(life))


def test_off_the_main_thread() -> None:
    outcome: list[Any] = []

    async def main() -> None:
        owner = Owner()
        group = await owner.start(2)
        outcome.append(await group.run_stage("echo", b""))
        group.send_plan(b"plan")
        await owner.until(lambda: owner.results == [b"plan"])
        await group.stop()
        outcome.append(alive(group.pids))

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join(30)
    assert outcome == [[b"0:", b"1:"], []]


def test_the_worker_process_is_lean_and_finds_what_the_host_finds(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "file").write_text("inherited")
        with open(tmp_path / "file") as file:
            group = await Owner().start(extra_fds={"file": file.fileno()})
            assert await group.run_stage("fd", b"") == [b"inherited"]
        (found,) = await group.run_stage("imports", b"")
        modules, path = eval(found)
        assert not {"torch", "transformers", "asyncio"} & set(modules)
        assert not [name for name in modules if name.startswith(("asyncengine.engine", "asyncengine.text"))]
        assert set(sys.path) - {""} <= set(path)
        await group.stop()

    asyncio.run(main())


def test_logs_reach_the_hosts_loggers(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        with caplog.at_level(logging.INFO, logger="asyncengine"):
            group = await Owner().start(2)
            await group.run_stage("log", b"")
            floods = await keeps_turning(lambda: group.run_stage("flood", b"5000"))
            await group.stop()
        return floods

    floods = asyncio.run(main())
    lines = [record for record in caplog.record_tuples if record[0] != "asyncengine.flood"]
    for rank in (0, 1):
        assert ("asyncengine.fake", logging.INFO, f"[rank {rank}] details 7") in lines
        assert ("elsewhere", logging.WARNING, f"[rank {rank}] watch out") in lines
        flood = [r[2] for r in caplog.record_tuples if r[0] == "asyncengine.flood" and f"rank {rank}" in r[2]]
        assert flood == [f"[rank {rank}] line {i}" for i in range(5000)] * floods
    assert len([line for line in lines if line[0] in ("asyncengine.fake", "elsewhere")]) == 4


# ---- failures in a stage


@pytest.mark.parametrize(
    ("num_ranks", "stage", "kind", "words"),
    [
        (1, "config error", ConfigError, r"^stage 'config error' failed: max_model_len=0 is too small"),
        (2, "config error", ConfigError, r"^stage 'config error' failed on rank 1 of 2: max_model_len"),
        (1, "memory error", OutOfMemoryError, "Unable to allocate 5 TiB"),
        (1, "defect", EngineDeadError, "ZeroDivisionError: "),
        (3, "exit", EngineDeadError, r"on rank 2 of 3 \(pid \d+\) exited with code 3 during stage 'exit'"),
        (2, "kill", EngineDeadError, "on rank 1 of 2 .* was killed by SIGKILL: .*memory"),
        (1, "segfault", EngineDeadError, "was killed by SIGSEGV during stage 'segfault'"),
        (1, "flood and fail", EngineDeadError, "RuntimeError: the last word"),
    ],
)
def test_a_stage_that_fails(
    run: Callable[[Any], Any], num_ranks: int, stage: str, kind: type[Exception], words: str
) -> None:
    async def main() -> None:
        owner = Owner()
        group = await owner.start(num_ranks)
        await group.run_stage("echo", b"")
        with pytest.raises(kind, match=words) as caught:
            await group.run_stage(stage, b"")
        if stage == "defect":
            assert (
                "ZeroDivisionError" in caught.value.__notes__[0] and "run_stage" in caught.value.__notes__[0]
            )
        with pytest.raises(kind, match=words):
            await group.run_stage("echo", b"")
        with pytest.raises(kind, match=words):
            group.send_plan(b"")
        await group.stop()
        assert alive(group.pids) == [] and owner.deaths == []

    run(main())


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("fake_worker:NoRunner", "stage 'start' failed: RuntimeError: cannot be made"),
        ("no_such_module:X", "No module named 'no_such_module'"),
    ],
)
def test_a_worker_that_cannot_begin(handler: str, words: str) -> None:
    async def main() -> None:
        group = await Owner().start(handler=handler)
        with pytest.raises(EngineDeadError, match=words):
            await group.run_stage("echo", b"")
        await group.stop()

    asyncio.run(main())


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        before = psutil.Process().num_fds()
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(EngineDeadError, match="/no/such/python"):
            await Owner().start(2)
        assert psutil.Process().num_fds() == before

    asyncio.run(main())


def test_a_cancelled_stage_leaves_only_stop() -> None:
    async def main() -> None:
        group = await Owner().start(2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.run_stage("sleep", b""), 0.3)
        with pytest.raises(EngineClosedError, match="cancelled"):
            await group.run_stage("echo", b"")
        begin = time.monotonic()
        await group.stop(0.1)
        assert time.monotonic() - begin < 3 and alive(group.pids) == []

    asyncio.run(main())


# ---- failures in service


@pytest.mark.parametrize(
    ("num_ranks", "plan", "words"),
    [
        (1, b"defect", "stage 'step' failed: KeyError"),
        (2, b"kill", r"on rank \d of 2 .* was killed by SIGKILL"),
    ],
)
def test_death_in_service_is_told_once(
    run: Callable[[Any], Any], num_ranks: int, plan: bytes, words: str
) -> None:
    async def main() -> None:
        owner = Owner()
        group = await owner.start(num_ranks)
        await group.run_stage("echo", b"")
        group.send_plan(b"good")
        group.send_plan(plan)
        group.send_plan(b"never run")
        await owner.until(lambda: bool(owner.deaths))
        await asyncio.sleep(0.1)
        assert len(owner.deaths) == 1
        assert "good" in owner.results[:1][0].decode() if num_ranks == 1 else True
        with pytest.raises(EngineDeadError, match=words):
            raise owner.deaths[0]
        with pytest.raises(EngineDeadError, match=words):
            group.send_plan(b"")
        await group.stop()
        assert alive(group.pids) == []

    run(main())


def test_death_between_stages_is_told_to_both(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        owner = Owner()
        group = await owner.start(2)
        assert await group.run_stage("exit later", b"") == [b"", b""]
        await owner.until(lambda: bool(owner.deaths))
        with pytest.raises(EngineDeadError, match=r"on rank 1 of 2 .* exited with code 4$"):
            await group.run_stage("echo", b"")
        assert len(owner.deaths) == 1
        await group.stop()

    run(main())


def test_death_from_outside_and_stop_inside_the_callback(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        owner = Owner()
        group = await owner.start(2)
        await group.run_stage("echo", b"")
        original = owner.on_death
        group._on_death = lambda error: (group.kill(), original(error))[
            1
        ]  # as an owner that gives up at once
        begin = time.monotonic()
        os.kill(group.pids[1], signal.SIGTERM)
        await owner.until(lambda: bool(owner.deaths))
        assert time.monotonic() - begin < 1
        assert "was killed by SIGTERM" in str(owner.deaths[0])
        assert alive(group.pids) == []
        await group.stop()

    run(main())


def test_a_full_ring_is_reported_and_nothing_is_lost() -> None:
    async def main() -> None:
        owner = Owner()
        group = await owner.start(ring_capacity=4096)
        await group.run_stage("echo", b"")
        assert group.max_plan == 4088
        with pytest.raises(ValueError, match="max_record"):
            group.send_plan(bytes(4089))
        sent = []
        for number in range(10_000):  # without giving the loop a turn, so results pile up as well
            plan = b"%d" % number
            if not group.send_plan(plan):
                break
            sent.append(plan)
        assert 100 < len(sent) < 10_000
        await owner.until(lambda: len(owner.results) == len(sent))
        assert owner.results == sent
        assert group.send_plan(b"again")
        await owner.until(lambda: owner.results[-1] == b"again")
        await group.stop()

    asyncio.run(main())


# ---- stopping what does not want to


@pytest.mark.parametrize("stage", ["sleep", "hang"])
def test_stop_of_a_busy_worker_answers_everybody(stage: str) -> None:
    async def life() -> None:
        group = await Owner().start()
        hanging = asyncio.Event()
        stage_task = asyncio.create_task(group.run_stage(stage, b"", lambda *_: hanging.set()))
        if stage == "hang":
            await hanging.wait()
        else:
            await asyncio.sleep(0.3)
        begin = time.monotonic()
        await group.stop(0.1)
        assert time.monotonic() - begin < 3 and alive(group.pids) == []
        with pytest.raises(EngineClosedError, match="stopped"):
            await stage_task

    asyncio.run(keeps_turning(life))


def test_a_cancelled_stop_goes_on() -> None:
    async def main() -> None:
        group = await Owner().start()
        await group.run_stage("echo", b"")
        group.send_plan(b"sleep")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.stop(0.2), 0.05)
        await group.stop()
        assert alive(group.pids) == []

    asyncio.run(main())


def test_a_loop_that_ends_while_stopping_leaves_nothing() -> None:
    pids: list[int] = []

    async def main() -> None:
        group = await Owner().start(2)
        await group.run_stage("echo", b"")
        group.send_plan(b"sleep")
        pids.extend(group.pids)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.stop(30), 0.05)

    asyncio.run(main())
    assert alive(pids) == []


@pytest.mark.parametrize("where", ["on the loop", "in a thread", "after the loop", "in a fork"])
def test_kill(where: str) -> None:
    before = psutil.Process().num_fds()
    groups: list[WorkerGroup] = []

    async def main() -> None:
        owner = Owner()
        group = await owner.start(2)
        groups.append(group)
        await group.run_stage("echo", b"")
        if where == "after the loop":
            return
        if where == "in a fork":
            child = os.fork()
            if child == 0:
                group.kill()
                os._exit(0)
            os.waitpid(child, 0)
            assert await group.run_stage("echo", b"") == [b"0:", b"1:"]
        stage = asyncio.create_task(group.run_stage("sleep", b""))
        await asyncio.sleep(0.1)
        if where == "in a thread":
            await asyncio.to_thread(group.kill)
        else:
            group.kill()
        group.kill()
        with pytest.raises(EngineClosedError, match="killed"):
            await stage
        await group.stop()
        assert owner.deaths == []

    asyncio.run(main())
    groups[0].kill()
    assert alive(groups[0].pids) == []
    assert psutil.Process().num_fds() == before


def test_twenty_lives_leave_no_descriptor_process_or_memory(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        me = psutil.Process()

        async def life(number: int) -> None:
            owner = Owner()
            group = await owner.start(1 + number % 2, ring_capacity=1 << 20)
            if number % 3:
                await group.run_stage("echo", b"")
                assert group.send_plan(bytes(1000))
                await owner.until(lambda: bool(owner.results))
            await group.stop(5 if number % 4 else 0)

        await life(1)
        fds, maps = me.num_fds(), len(me.memory_maps(grouped=False))
        for number in range(20 if type(asyncio.get_running_loop()) is not uvloop.Loop else 6):
            await life(number)
        assert me.num_fds() == fds
        assert len(me.memory_maps(grouped=False)) <= maps + 5
        assert me.children() == []

    run(main())
