"""What workers do when the process that started them is killed or interrupted."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .groups import HERE, Owner, alive, wait_gone

HOST = """
import asyncio, json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from asyncengine.engine.supervisor import WorkerGroup

async def main():
    group = await WorkerGroup.start(2, on_result=print, on_death=print, handler="fake_worker:FakeRunner")
    await group.run_stage("echo", b"")
    doing = asyncio.create_task(group.run_stage(sys.argv[3], b""))
    await asyncio.sleep(0.2)
    if sys.argv[2] == "forked" and os.fork() == 0:  # holds a copy of everything, the lifelines too
        os.closerange(0, 3)
        time.sleep(4)
        os._exit(0)
    if sys.argv[2] == "main":  # asyncio.run's own handler does not wake a loop that is just about to wait
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, asyncio.current_task().cancel)
    print(json.dumps(group.pids), flush=True)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        # Ctrl-C: the workers must still be there and working.
        print(await group.run_stage("echo", b"after") if sys.argv[3] == "log" else "", flush=True)
        await group.stop()

if sys.argv[2] != "main":
    import threading
    threading.Thread(target=asyncio.run, args=(main(),)).start()
else:
    asyncio.run(main())
"""


@contextmanager
def host(where: str, stage: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOST, HERE, where, stage],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        yield process, json.loads(line or process.stderr.read())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("where", "stage"),
    [
        ("main", "log"),
        ("main", "sleep"),
        ("main", "hang"),
        ("thread", "log"),
        ("thread", "sleep"),
        ("forked", "log"),
    ],
)
def test_workers_die_with_a_killed_host(where: str, stage: str) -> None:
    before = set(os.listdir("/dev/shm"))
    with host(where, stage) as (process, pids):
        assert len(alive(pids)) == 2
        process.send_signal(signal.SIGKILL)
        wait_gone(pids, 2.0)
    assert set(os.listdir("/dev/shm")) <= before


def test_interrupting_the_process_group_spares_the_workers() -> None:
    with host("main", "log") as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert "[b'0:after', b'1:after']" in out, err
        wait_gone(pids, 2.0)


def test_interrupting_workers_that_are_just_being_born() -> None:
    async def main() -> None:
        group = await Owner().start(2)
        for _ in range(40):
            for pid in group.pids:
                os.kill(pid, signal.SIGINT)
            await asyncio.sleep(0.005)
        assert await group.run_stage("echo", b"") == [b"0:", b"1:"]
        await group.stop()

    asyncio.run(main())
