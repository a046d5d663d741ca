"""The CUDA backend on CPU tensors."""

import queue

import pytest

from asyncengine.worker.cuda import backend
from asyncengine.worker.cuda.device import HostDevice

from .tiny import Started

SIZES = dict(
    device="cuda", block_size=16, max_model_len=96, max_num_seqs=4, max_num_samples=4,
    max_num_batched_tokens=24, max_logprobs=6, num_blocks=40,
)  # fmt: skip


class HostStarted(Started):
    """Like `Started`, of a runner that takes the host for its GPU. `step` waits for the result."""

    def __init__(self, spec, weights, open_device=HostDevice, **fields):
        self.results = queue.SimpleQueue()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "open_device", lambda rank: open_device())
            super().__init__(spec, weights, **(SIZES | fields))

    def make_runner(self, rank, world, fds):
        runner = super().make_runner(rank, world, fds)
        runner.reply = self.results.put
        return runner

    def step(self, plan):
        assert self.runner.step(plan) is None
        return self.results.get(timeout=30)

    def driver(self):
        driver = super().driver()
        driver.run = self.step
        return driver
