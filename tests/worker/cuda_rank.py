"""One rank of the CUDA backend on CPU tensors as a process of its own, which runs the plans in a file.

`python cuda_rank.py RANK WORLD FD DIRECTORY`
"""

import queue
import sys
from pathlib import Path

import msgspec

sys.path.append(str(Path(__file__).parents[1]))
import interpreter  # noqa: F401

from asyncengine.errors import OutOfMemoryError
from asyncengine.wire.stages import Allocate, Sleep, Slept, Woken
from asyncengine.worker.cuda import backend, offload
from asyncengine.worker.cuda.device import HostDevice
from asyncengine.worker.memory import available_bytes
from asyncengine.worker.runner import Runner


def sleep_with_troubles_of_rank_1(runner, rank, stage):
    """It has no room in host memory, and then none on its GPU: both times the others hear of it in time."""

    def sleep():
        return msgspec.msgpack.decode(stage("sleep", msgspec.msgpack.encode(Sleep(1))), type=Slept).lacking

    def wake_up():
        return msgspec.msgpack.decode(stage("wake_up"), type=Woken).lacking

    def fail():
        raise OutOfMemoryError("1,000 are free")

    troubled = rank == 1
    if troubled:
        offload.available_bytes = lambda: 1000
    assert ("1,000 bytes are free" if troubled else "another rank") in sleep()
    assert wake_up() == ""
    offload.available_bytes = available_bytes
    assert sleep() == ""
    if troubled:
        runner._cuda._check_waking = fail
    assert ("1,000 are free" if troubled else "another rank") in wake_up()
    runner._cuda.__dict__.pop("_check_waking", None)
    assert sleep() == wake_up() == ""


def main(rank, world, fd, directory):
    backend.open_device = lambda rank: HostDevice()
    runner = Runner(rank, world, {"rendezvous": fd})
    results = queue.SimpleQueue()
    runner.reply = results.put

    def stage(name, payload=b""):
        return runner.run_stage(name, payload, lambda *_: None)

    stage("config", (directory / "config").read_bytes())
    loaded = stage("load")
    stage("profile")
    stage("allocate", msgspec.msgpack.encode(Allocate(40)))
    stage("capture")
    sleep_with_troubles_of_rank_1(runner, rank, stage)
    plans = msgspec.msgpack.decode((directory / "plans").read_bytes(), type=list[bytes])
    for plan in plans:
        assert runner.step(plan) is None
    answers = [results.get(timeout=60) for _ in plans] if rank == 0 else []
    runner.close()
    assert results.empty()
    (directory / f"rank-{rank}").write_bytes(msgspec.msgpack.encode([loaded, answers]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
