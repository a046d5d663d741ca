"""Several ranks as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from asyncengine.wire.stages import Loaded


def recording(started, plans, results):
    """The driver of a single rank that notes its plans and their results: what several are to agree with."""
    driver = started.driver()

    def step(plan):
        plans.append(plan)
        results.append(started.runner.step(plan))
        return results[-1]

    driver.run = step
    return driver


def run_ranks(script, fd, config, plans, world, directory, seconds, **environment):
    """(bytes of weights by rank, results by rank) of `script`, beside this file, which gets `fd` and so many
    seconds."""
    (directory / "config").write_bytes(msgspec.msgpack.encode(config))
    (directory / "plans").write_bytes(msgspec.msgpack.encode(plans))
    command = [sys.executable, "-P", Path(__file__).with_name(script)]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(fd), directory],
            env=os.environ | path | environment,
            pass_fds=[fd],
        )
        for rank in range(world)
    ]
    try:
        assert [rank.wait(seconds) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    replies = [msgspec.msgpack.decode((directory / f"rank-{rank}").read_bytes()) for rank in range(world)]
    weights = [msgspec.msgpack.decode(loaded, type=Loaded).weight_bytes for loaded, _ in replies]
    return weights, [results for _, results in replies]
