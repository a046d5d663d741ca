"""One rank: the stages of its start, and then a result for every plan."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from msgspec import msgpack

from ..checkpoint.sharding import Shard, check_parallel
from ..errors import ConfigError, OutOfMemoryError
from ..wire.stages import (
    Allocate,
    Allocated,
    Captured,
    Loaded,
    Profiled,
    Sleep,
    Slept,
    Woken,
    WorkerConfig,
)
from .batch import Batch
from .load import open_checkpoint
from .memory import available_bytes
from .models.decoder import Decoder
from .models.registry import build_model
from .ops.cpu_backend import CpuBackend
from .sampler import Sampler

if TYPE_CHECKING:  # imports torch
    from .cuda.backend import CudaBackend

__all__ = ["Runner"]

Progress = Callable[[int, int, str], None]

_MOST = 2**31 - 1


class Runner:
    """Where there are several ranks, they meet on a CPU at `fds["comm"]`, their shared memory, and on GPUs at
    `fds["rendezvous"]`, an empty file."""

    reply: Callable[[bytes], None]
    """Takes the results that `step` does not return, in order, on another thread. Whoever makes the runner
    sets it before the last stage."""

    def __init__(self, rank: int, world_size: int, fds: dict[str, int]) -> None:
        self._shard = Shard(rank, world_size)
        self._fds = fds
        self._cuda: CudaBackend | None = None
        self._stages: dict[str, Callable[[bytes, Progress], object]] = {
            "config": self._configure,
            "load": self._load,
            "profile": self._profile,
            "allocate": self._allocate,
            "capture": self._capture,
            "sleep": self._sleep,
            "wake_up": self._wake_up,
        }

    def run_stage(self, stage: str, payload: bytes, progress: Progress) -> bytes:
        """Runs one stage, in the order of `wire/stages.py`; payload and answer are its messages. The last two
        come later, when no step is in flight.

        `progress` takes done, total and unit. Raises ConfigError, ModelLoadError or OutOfMemoryError.
        """
        return msgpack.encode(self._stages[stage](payload, progress))

    def close(self) -> None:
        """Gives threads and memory back; the runner cannot be used afterwards."""
        if self._cuda is not None:
            self._cuda.close()
        for name in ("_sampler", "_batch", "backend", "_cuda"):
            self.__dict__.pop(name, None)

    @property
    def _either_backend(self) -> "CpuBackend | CudaBackend":
        return self.backend if self._cuda is None else self._cuda

    def _configure(self, payload: bytes, progress: Progress) -> None:
        config = msgpack.decode(payload, type=WorkerConfig)
        check_parallel(config.spec, self._shard.world)
        self._config = config
        self._model = build_model(config.spec, self._shard)
        if config.device == "cuda":
            self._cuda = _cuda_backend(config, self._model, self._shard, self._fds)
            return
        comm = self._fds["comm"] if self._shard.world > 1 else None
        self.backend = CpuBackend(config, self._model, self._shard, comm)

    def _load(self, payload: bytes, progress: Progress) -> Loaded:
        checkpoint = open_checkpoint(self._config, self._model)
        try:
            return Loaded(
                self._either_backend.load(checkpoint, lambda done, total: progress(done, total, "bytes"))
            )
        finally:
            checkpoint.close()

    def _profile(self, payload: bytes, progress: Progress) -> Profiled:
        if self._cuda is not None:
            return self._cuda.profile()
        backend = self.backend
        return Profiled(backend.step_bytes(), backend.kv_layout.bytes_per_block, available_bytes())

    def _allocate(self, payload: bytes, progress: Progress) -> Allocated:
        return Allocated(self._either_backend.allocate(msgpack.decode(payload, type=Allocate).num_blocks))

    def _capture(self, payload: bytes, progress: Progress) -> Captured:
        config = self._config
        if self._cuda is not None:
            deliver = self.reply if self._shard.rank == 0 else _drop
            return self._cuda.capture(lambda done, total: progress(done, total, "graphs"), deliver)
        self._batch = Batch(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_model_len,
            config.max_num_samples,
            config.block_size,
            self.backend.cache.num_blocks,
        )
        self._sampler = Sampler(self.backend.team, config.max_num_seqs, config.spec.vocab_size)
        self._tokens = np.zeros(config.max_num_samples, np.int32)
        operations, nbytes = self.backend.capture(self._batch)
        return Captured(0 if config.enforce_eager else operations, nbytes)

    def _sleep(self, payload: bytes, progress: Progress) -> Slept:
        try:
            return Slept(self._either_backend.sleep(msgpack.decode(payload, type=Sleep).level))
        except OutOfMemoryError as error:
            return Slept(0, str(error))

    def _wake_up(self, payload: bytes, progress: Progress) -> Woken:
        lacking = self._either_backend.wake_up(
            lambda: open_checkpoint(self._config, self._model),
            lambda done, total: progress(done, total, "bytes"),
        )
        return Woken(lacking)

    def step(self, data: bytes) -> bytes | None:
        """Runs one plan. Rank 0 answers with the Result; the others give None, and so do GPUs, on which the
        plan is only launched: rank 0's Result goes to `reply` once it is there."""
        if self._cuda is not None:
            self._cuda.submit(data)
            return None
        began = time.perf_counter_ns()
        batch, backend, first = self._batch, self.backend, self._shard.rank == 0
        copies, inits = batch.prepare(data)
        if first:
            for init in inits:
                self._sampler.enter(init)
        if len(copies):
            backend.cache.copy_blocks(copies)
        samples = batch.inputs.num_samples
        slots, positions = batch.sample_slots, batch.sample_positions
        self._sampler.head_modes(slots, positions, backend.modes)
        logits = backend.run(batch)
        tokens = self._tokens[:samples]
        details = None
        if samples:
            if first:
                best_k = backend.modes.k if backend.best else None
                details = self._sampler.draw(
                    logits, slots, positions, tokens, best=backend.best, best_k=best_k
                )
            if backend.comm is not None:
                backend.comm.broadcast_tokens(tokens.data)
            batch.inputs.keep(tokens)
        if not first:
            return None
        payload = b"" if details is None else msgpack.encode(details)
        spent = min((time.perf_counter_ns() - began) // 1000, _MOST)
        return batch.inputs.result(tokens, payload, spent)


def _cuda_backend(config: WorkerConfig, model: Decoder, shard: Shard, fds: dict[str, int]) -> "CudaBackend":
    try:
        from .cuda.backend import CudaBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torch", "triton"):
            raise
        raise ConfigError(
            f"device='cuda' needs the package {error.name!r}, which is not installed;"
            " pip install 'asyncengine[cuda]', or use device='cpu'",
            parameter="device",
            value="cuda",
        ) from error
    return CudaBackend(config, model, shard, fds)


def _drop(result: bytes) -> None:
    """Ranks after the first compute the same results and report none."""
