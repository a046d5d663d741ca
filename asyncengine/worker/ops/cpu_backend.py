"""The CPU behind the runner: a thread team, weights, KV memory, and the recorded step program."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from asyncengine._fast.cpu import (
    OPERATION_BYTES,
    Buffer,
    Comm,
    Program,
    Step,
    Team,
    attention_workspace,
    kv_block_bytes,
    sample_workspace,
)

from ...checkpoint.sharding import Shard, comm_region_bytes
from ...checkpoint.tensor import Checkpoint
from ...errors import ModelLoadError, OutOfMemoryError
from ...wire.stages import WorkerConfig
from ..batch import Batch
from ..kv_cache import KVCache, KVLayout
from ..load import check_weights, fill
from ..memory import available_bytes
from ..models.decoder import Decoder
from ..rope import cos_sin_table
from ..sampler import HeadModes
from .cpu import KV_TYPES, Handle, Operation, Placement, Recorder, StepMemory
from .cpu_weights import CpuWeights

__all__ = ["CpuBackend"]

_MAX_HEAD_DIM = 512


class CpuBackend:
    """Built up in the order of the stages: `load`, `step_bytes`, `allocate`, `capture`; then `run`."""

    def __init__(self, config: WorkerConfig, model: Decoder, shard: Shard, comm_fd: int | None) -> None:
        spec = config.spec
        if spec.head_dim > _MAX_HEAD_DIM or spec.head_dim % 2:
            raise ModelLoadError(
                f"heads of size {spec.head_dim} are not supported; supported: even ones up to {_MAX_HEAD_DIM}"
            )
        self._config = config
        self._model = model
        self._world = shard.world
        self._heads = (len(shard.part(spec.num_heads)), len(shard.kv_heads(spec.num_kv_heads)))
        self._rope = cos_sin_table(spec, config.max_model_len)
        self._mean_rope = self._rope.mean(axis=0) if config.kv_dtype == "int8" else None
        self.team = Team(config.num_threads)
        self.comm = (
            None if comm_fd is None else Comm(comm_fd, shard.rank, shard.world, comm_region_bytes(spec))
        )
        piece = kv_block_bytes(KV_TYPES[config.kv_dtype], self._heads[1], config.block_size, spec.head_dim)
        self.kv_layout = KVLayout(spec.num_layers, piece)

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> int:
        """Packs the weights; the bytes they take on this rank. OutOfMemoryError if they cannot fit."""
        config, parameters = self._config, list(self._model.parameters())
        sizes = check_weights(self._model, checkpoint)
        free = available_bytes()
        self._weights = CpuWeights(self.team, parameters, checkpoint, config.dtype, config.quantization)
        if self._weights.expected_bytes > free:
            # The mapping itself costs nothing; filling it would call for the kernel's OOM killer.
            raise OutOfMemoryError(
                f"the weights take {self._weights.expected_bytes:,} bytes as"
                f" {config.quantization or config.dtype} on each rank, and {free:,} are free; use"
                " quantization='int8' or 'int4', a smaller model, or free memory"
            )
        fill(self._weights, parameters, checkpoint, sizes, progress)
        self._weights.finish()
        return self._weights.nbytes

    def step_bytes(self) -> int:
        """What a step of the largest size needs: activations, rotary table, sampler's workspace."""
        sampler = sample_workspace(self._config.num_threads, self._config.spec.vocab_size)
        return self._activation_bytes() + self._rope.nbytes + sampler

    def _activation_bytes(self) -> int:
        memory = StepMemory(0)
        self._record(memory, lambda layer: (0, 0))
        return memory.size

    def allocate(self, num_blocks: int) -> int:
        """Takes the KV memory; its bytes."""
        self._asleep = 0
        try:
            self.cache = KVCache(self.kv_layout, num_blocks)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{num_blocks} KV blocks of {self.kv_layout.bytes_per_block:,} bytes cannot be mapped;"
                " lower kv_cache_memory_bytes, or raise the process's memory limits"
            ) from error
        return self.cache.nbytes

    def capture(self, batch: Batch) -> tuple[int, int]:
        """Records the step program over `batch`'s arrays; the number of its operations, and their bytes."""
        self._activations = Buffer(self._activation_bytes())
        recorder, self._logits = self._record(StepMemory(self._activations.address), self.cache.addresses)
        self.operations: list[Operation] = recorder.operations
        self.best = recorder.best
        """Address of what the head keeps of rows that it does not store; 0: it stores all."""
        samples = self._config.max_num_samples
        self.modes = HeadModes(np.full(samples, -1, np.int32), np.ones(samples, np.float32))
        self._program = Program(self.team)
        for operation in self.operations:
            self._program.add(*operation)
        self._step = Step(
            **batch.step_arrays(),
            head_k=self.modes.k.data,
            head_temperature=self.modes.temperature.data,
        )
        return len(self._program), OPERATION_BYTES * len(self._program)

    def sleep(self, level: int) -> int:
        """Gives back the KV memory, at level 2 the weights too; their bytes. No address changes."""
        self._asleep = max(level, self._asleep)
        self.cache.discard()
        if self._asleep == 1:
            return self.cache.nbytes
        self._weights.discard()
        return self.cache.nbytes + self._weights.nbytes

    def wake_up(self, open_checkpoint: Callable[[], Checkpoint], progress: Callable[[int, int], None]) -> str:
        """Takes again what `sleep` gave back; why that cannot be, or nothing."""
        if self._asleep == 0:
            return ""
        needed = self.cache.nbytes + (self._weights.nbytes if self._asleep == 2 else 0)
        free = available_bytes()
        if needed * self._world > free:
            ranks = f" on each of {self._world} ranks" if self._world > 1 else ""
            return f"{needed:,} bytes were given back{ranks}, and {free:,} are free now"
        if self._asleep == 2:
            checkpoint = open_checkpoint()
            try:
                sizes = check_weights(self._model, checkpoint)
                fill(self._weights, list(self._model.parameters()), checkpoint, sizes, progress)
                self._weights.finish()
            finally:
                checkpoint.close()
        self._asleep = 0
        return ""

    def run(self, batch: Batch) -> int:
        """Computes the step that `batch` has prepared; the address of its logits [samples, vocabulary], of
        which `modes` tells the rows that are stored."""
        inputs = batch.inputs
        self._step.set_counts(inputs.num_tokens, inputs.num_rows, inputs.num_samples)
        if self._config.enforce_eager:
            for index in range(len(self._program)):
                self._program.run_op(index, self._step)
        else:
            self._program.run(self._step)
        return self._logits.address

    @property
    def logits(self) -> NDArray[np.float32]:
        """The buffer of the step's logits, [max_num_samples, vocabulary]."""
        shape = (self._config.max_num_samples, self._logits.width)
        offset = self._logits.address - self._activations.address
        values = np.frombuffer(memoryview(self._activations), np.float32, math.prod(shape), offset)
        return values.reshape(shape)

    def _record(
        self, memory: StepMemory, kv_addresses: Callable[[int], tuple[int, int]]
    ) -> tuple[Recorder, Handle]:
        config = self._config
        place = Placement(
            spec=config.spec,
            heads=self._heads,
            max_tokens=config.max_num_batched_tokens,
            max_samples=config.max_num_samples,
            weights=self._weights,
            rope=self._rope.ctypes.data,
            mean_rope=0 if self._mean_rope is None else self._mean_rope.ctypes.data,
            block_size=config.block_size,
            kv_dtype=config.kv_dtype,
            kv_addresses=kv_addresses,
            kv_stride=self.kv_layout.bytes_per_block,
            comm=0 if self.comm is None else self.comm.address,
            rank=0 if self.comm is None else self.comm.rank,
            num_threads=config.num_threads,
            workspace_bytes=attention_workspace(
                config.num_threads, *self._heads, config.spec.head_dim, config.max_model_len
            ),
        )
        recorder = Recorder(place, memory)
        logits = self._model.forward(recorder)
        recorder.finish(logits)
        return recorder, logits
