"""One rank of the CUDA backend on CPU tensors as a process of its own, which runs the plans in a file.

`python cuda_rank.py RANK WORLD FD DIRECTORY`
"""

import queue
import sys
from pathlib import Path

import msgspec

sys.path.append(str(Path(__file__).parents[1]))
import interpreter  # noqa: F401

from asyncengine.wire.stages import Allocate
from asyncengine.worker.cuda import backend
from asyncengine.worker.cuda.device import HostDevice
from asyncengine.worker.runner import Runner


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
    plans = msgspec.msgpack.decode((directory / "plans").read_bytes(), type=list[bytes])
    for plan in plans:
        assert runner.step(plan) is None
    answers = [results.get(timeout=60) for _ in plans] if rank == 0 else []
    runner.close()
    assert results.empty()
    (directory / f"rank-{rank}").write_bytes(msgspec.msgpack.encode([loaded, answers]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
