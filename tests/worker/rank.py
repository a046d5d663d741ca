"""One rank as a process of its own, which runs the plans in a file.

`python rank.py RANK WORLD FD DIRECTORY`
"""

import sys
from pathlib import Path

import msgspec

from asyncengine.wire.stages import Allocate
from asyncengine.worker.runner import Runner


def main(rank, world, fd, directory):
    runner = Runner(rank, world, {"comm": fd})

    def stage(name, payload=b""):
        return runner.run_stage(name, payload, lambda *_: None)

    stage("config", (directory / "config").read_bytes())
    loaded = stage("load")
    stage("profile")
    stage("allocate", msgspec.msgpack.encode(Allocate(200)))
    stage("capture")
    plans = msgspec.msgpack.decode((directory / "plans").read_bytes(), type=list[bytes])
    results = [runner.step(plan) for plan in plans]
    runner.close()
    (directory / f"rank-{rank}").write_bytes(msgspec.msgpack.encode([loaded, results]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
