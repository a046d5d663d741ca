"""The thread team, the buffers it works on, and the program as a whole."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from asyncengine._fast import cpu


def tasks() -> dict[int, str]:
    return {int(p.parent.name): p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")}


def chain(team: cpu.Team, width: int, ops: int, rows: int) -> tuple[cpu.Program, np.ndarray, list[object]]:
    """A program in which every op reads all of what the one before wrote: x <- rotate(x) + 1.

    Integers in float32, so that any stale read shows.
    """
    shift = np.roll(np.eye(width, dtype=np.float32), 1, axis=0)
    weight = cpu.Buffer(cpu.packed_bytes(width, width, "F32"))
    cpu.pack_linear(team, "F32", shift, width, width, weight, "F32")
    bias = np.ones(width, np.float32)
    x, y = np.zeros((rows, width), np.float32), np.zeros((rows, width), np.float32)
    x[:] = np.arange(width)
    program = cpu.Program(team)
    for i in range(ops):
        a, b = (x, y) if i % 2 == 0 else (y, x)
        program.add(
            cpu.LINEAR,
            cpu.TOKENS,
            [b.ctypes.data, a.ctypes.data, weight.address, bias.ctypes.data],
            [width, width, cpu.F32],
        )
    return program, x, [weight, bias, y]


def step_of(tokens: int) -> cpu.Step:
    row = np.zeros(tokens, np.int32)
    step = cpu.Step(
        token_ids=row,
        positions=row,
        token_row=row,
        query_start=np.zeros(2, np.int32),
        context_len=row,
        row_slot=row,
        block_table=row.reshape(1, -1),
        sample_rows=row,
    )
    step.set_counts(tokens, 0, 0)
    return step


@pytest.mark.parametrize(("threads", "rounds"), [(1, 20), (2, 100), (3, 20), (8, 5)])
@pytest.mark.parametrize("rows", [1, 20])
def test_every_op_sees_all_of_the_one_before(threads: int, rounds: int, rows: int) -> None:
    width, ops = 160, 30
    program, x, held = chain(cpu.Team(threads), width, ops, rows)
    step = step_of(rows)
    expected = np.arange(width, dtype=np.float32)
    for _ in range(rounds):
        program.run(step)
        expected = np.roll(expected, ops) + ops
        assert (x == expected).all()
    del held


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("threads", [4, 7])
def test_threads_that_sleep_at_every_meeting_are_woken(threads: int) -> None:
    """With fewer processors than threads nobody spins, and threads come late to most programs."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:2])
    try:
        team = cpu.Team(threads)
        short, x, held = chain(team, 64, 6, 3)
        large, y, held_too = chain(team, 64, 2, 100)
        for i in range(1, 4001):
            short.run(step_of(3))
            assert (x == np.roll(np.arange(64), 6 * i) + 6 * i).all()
            if i % 5 == 0:
                large.run(step_of(100))
        assert (y == np.roll(np.arange(64), 2 * 800) + 2 * 800).all()
    finally:
        os.sched_setaffinity(0, allowed)
    del held, held_too


def test_callers_on_several_threads_take_turns() -> None:
    team = cpu.Team(2)
    chains = [chain(team, 96, 10, 3) for _ in range(3)]
    callers = [
        threading.Thread(target=lambda p=p: [p.run(step_of(3)) for _ in range(50)]) for p, _, _ in chains
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for _, x, _ in chains:
        assert (x == np.roll(np.arange(96), 500) + 500).all()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a processor for each thread")
def test_short_programs_do_not_wait_for_a_thread_without_a_processor() -> None:
    """Another process keeps its processor busy: with waiting for it at every op this would take minutes. Now
    and then it comes in, at whatever op, or when the program is over."""
    before = set(tasks())
    team = cpu.Team(2)
    (late,) = set(tasks()) - before
    program, x, held = chain(team, 160, 30, 3)
    large, y, held_too = chain(team, 160, 2, 100)
    free, busy, *_ = allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(late, [busy])
    os.sched_setscheduler(late, os.SCHED_IDLE, os.sched_param(0))
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(burner.pid, [busy])
        os.sched_setaffinity(0, [free])
        start = time.monotonic()
        for i in range(1, 1001):
            program.run(step_of(3))
            assert (x == np.roll(np.arange(160), 30 * i) + 30 * i).all()
        assert time.monotonic() - start < 30
    finally:
        burner.kill()
        burner.wait()
        os.sched_setaffinity(0, allowed)
    for i in range(1, 101):
        large.run(step_of(100))
        program.run(step_of(3))
        assert (y == np.roll(np.arange(160), 2 * i) + 2 * i).all()
    assert (x == np.roll(np.arange(160), 30 * 1100) + 30 * 1100).all()
    del held, held_too


def test_threads_are_named_block_signals_and_end() -> None:
    before = set(tasks())
    team = cpu.Team(3)
    mine = {t: name for t, name in tasks().items() if t not in before}
    for _ in range(100):
        if sorted(mine.values()) == ["ae-cpu-1", "ae-cpu-2"]:
            break
        time.sleep(0.01)
        mine = {t: name for t, name in tasks().items() if t not in before}
    assert sorted(mine.values()) == ["ae-cpu-1", "ae-cpu-2"]
    for task in mine:
        status = Path(f"/proc/self/task/{task}/status").read_text()
        blocked = int(re.findall(r"SigBlk:\s+(\w+)", status)[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
            assert blocked >> (number - 1) & 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    del team
    gc.collect()
    assert not set(mine) & set(tasks())


def test_idle_teams_use_no_processor() -> None:
    teams = [cpu.Team(4) for _ in range(3)]
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
    del teams


FORK = """
import os, sys, threading
from asyncengine._fast import cpu
import numpy as np
team = cpu.Team(3)
program = cpu.Program(team)
row = np.zeros(1, np.int32)
step = cpu.Step(token_ids=row, positions=row, token_row=row, query_start=np.zeros(2, np.int32),
                context_len=row, row_slot=row, block_table=row.reshape(1, 1), sample_rows=row)
program.run(step)
child = os.fork()
if child == 0:
    try:
        program.run(step)
    except RuntimeError as error:
        assert "parent process" in str(error)
        own = cpu.Team(2)
        cpu.Program(own).run(step)
        del program, team, own
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
program.run(step)
"""


def test_a_forked_child_is_refused_and_can_leave() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=30)


def test_threads_that_cannot_start_leave_nothing_behind() -> None:
    """Under a limit of processes the team fails with OSError, and the threads that did start end."""
    script = """
import os, resource
from asyncengine._fast import cpu
os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))
try:
    cpu.Team(64)
except OSError as error:
    assert "cannot start 64 threads" in str(error), error
    assert len(os.listdir("/proc/self/task")) == 1
else:
    raise SystemExit("started 64 threads under a limit of 4")
"""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user without processes")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_levels() -> None:
    assert cpu.levels()[0] == "portable"
    assert cpu.Team(1).level == cpu.levels()[-1]
    with pytest.raises(ValueError, match="level 'sse9' is not available here; this machine has portable"):
        cpu.Team(1, "sse9")
    for wrong in (0, -1, 5000):
        with pytest.raises(ValueError, match="num_threads must be between 1 and 1024"):
            cpu.Team(wrong)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 2_000_000, 5_000_001])
def test_buffer(nbytes: int) -> None:
    buffer = cpu.Buffer(nbytes)
    assert buffer.address % 64 == 0
    assert nbytes < 2 << 20 or buffer.address % (2 << 20) == 0
    assert len(buffer) == buffer.nbytes == nbytes
    array = np.frombuffer(buffer, np.uint8) if nbytes else np.empty(0, np.uint8)
    assert not array.any()
    array[:] = 3
    del buffer
    gc.collect()
    assert (array == 3).all(), "the view keeps the memory"


def test_buffer_memory_counts_when_touched_and_is_given_back() -> None:
    size = 256 << 20
    start = resident()
    buffer = cpu.Buffer(size)
    assert resident() - start < size // 8
    np.frombuffer(buffer, np.uint8)[: size // 2] = 1
    assert size // 4 < resident() - start < size * 3 // 4
    del buffer
    gc.collect()
    assert resident() - start < size // 8


def test_buffers_that_cannot_be() -> None:
    with pytest.raises(MemoryError, match="cannot map"):
        cpu.Buffer(1 << 60)
    with pytest.raises(ValueError, match="must not be negative"):
        cpu.Buffer(-1)
