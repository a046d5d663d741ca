"""A GPU behind the runner: weights, KV memory, decode graphs, and steps that are launched without waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from asyncengine.kernels.paged_attention import AttentionWorkspace
from asyncengine.kernels.sampler import SamplerWorkspace, sample

from ...checkpoint.sharding import Shard
from ...checkpoint.tensor import Checkpoint
from ...errors import ConfigError, ModelLoadError, OutOfMemoryError
from ...wire.plan import PLAN_HEADER, ROW_FIELDS, SAMPLE
from ...wire.stages import Captured, DeviceMemory, Profiled, WorkerConfig
from ..load import check_weights, fill
from ..models.decoder import Decoder
from ..models.parameters import Parameter
from ..rope import cos_sin_table
from .batch import Batch, Step
from .device import Device, open_device
from .flights import Draws, Flight, Flights
from .graphs import GRAPH_BYTES, Graphs, graph_sizes
from .group import Group
from .kv_cache import KVCache, KVLayout
from .offload import HostMemory, Offload
from .ops import CudaOps, Fixtures
from .plan import Limits, Plan, parse_plan
from .slots import RECORD_STRIDE, Slots
from .weights import TORCH_DTYPES, Weights

__all__ = ["CudaBackend"]

FLIGHTS = 4
"""Most steps that are launched before the first one's result is home. More wait in the plan ring."""
MAX_HEAD_DIM = 256
LARGEST_TILE = 256
"""Query tokens beyond which rows of any length are computed by the same kernels."""

_KV_DTYPES = {**TORCH_DTYPES, "fp8_e4m3": torch.float8_e4m3fn}


class CudaBackend:
    """Built up in the order of the stages: `load`, `profile`, `allocate`, `capture`; then `submit`.

    All calls come from one thread. `fds["rendezvous"]` is the file at which several ranks meet.
    """

    def __init__(self, config: WorkerConfig, model: Decoder, shard: Shard, fds: dict[str, int]) -> None:
        _check_config(config)
        spec = config.spec
        self._config, self._model, self._shard = config, model, shard
        self._device = device = open_device(shard.rank)
        self._group = Group(shard, device.place, fds["rendezvous"]) if shard.world > 1 else None
        self._start_bytes, self._total_bytes = device.memory()
        self._asleep = 0
        self._parked: HostMemory | None = None
        heads = len(shard.kv_heads(spec.num_kv_heads))
        kv_dtype = _KV_DTYPES[config.kv_dtype]
        self.kv_layout = KVLayout(spec.num_layers, heads, config.block_size, spec.head_dim, kv_dtype)

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> int:
        """Brings the weights to the device; the bytes they take. OutOfMemoryError if they cannot fit."""
        config, parameters = self._config, list(self._model.parameters())
        sizes = check_weights(self._model, checkpoint)
        self._weights = _weights(config, self._device, parameters)
        self._fill(parameters, checkpoint, sizes, progress)
        return self._weights.nbytes

    def _fill(
        self,
        parameters: list[Parameter],
        checkpoint: Checkpoint,
        sizes: dict[str, int],
        progress: Callable[[int, int], None],
    ) -> None:
        config = self._config
        needed, free = self._weights.expected_bytes, self._device.memory()[0]
        if needed > free:
            raise OutOfMemoryError(
                f"the weights take {needed:,} bytes as {config.dtype} on each GPU, and {free:,} are free; use"
                " a smaller dtype or model, a larger tensor_parallel_size, cpu_offload_gb, or free memory"
            )
        with _out_of_memory("the weights", "use a smaller model or dtype, or free memory"):
            fill(self._weights, parameters, checkpoint, sizes, progress)
        self._weights.finish()

    def profile(self) -> Profiled:
        """Makes the step's buffers, and measures what the largest steps need."""
        config, device = self._config, self._device
        before = device.allocated()
        with _out_of_memory("a step's buffers", "lower max_num_batched_tokens or max_num_seqs"):
            self._make_buffers()
            self.cache = KVCache(self.kv_layout, 1, device.place)
            self._compile()
            peak = device.peak(lambda: self._run_dummy(config.max_num_batched_tokens, config.max_num_seqs))
            kept = device.allocated()
            decode = device.peak(lambda: self._run_dummy(config.max_num_seqs, config.max_num_seqs)) - kept
        del self.cache
        graphs = 0 if config.enforce_eager else decode + GRAPH_BYTES * len(graph_sizes(config.max_num_seqs))
        return Profiled(
            peak - before + config.max_num_seqs * self._slots.vector_bytes,
            self.kv_layout.bytes_per_block,
            device.memory()[0] + device.allocated() - before,
            DeviceMemory(
                total_bytes=self._total_bytes,
                start_bytes=self._start_bytes,
                weight_bytes=self._weights.nbytes,
                graph_bytes=graphs,
            ),
        )

    def allocate(self, num_blocks: int) -> int:
        """Takes the KV memory; its bytes."""
        with _out_of_memory(
            f"{num_blocks:,} KV blocks", "lower gpu_memory_utilization or kv_cache_memory_bytes"
        ):
            self.cache = KVCache(self.kv_layout, num_blocks, self._device.place)
        self._num_blocks = num_blocks
        self._batch.limits = self._batch.limits._replace(num_blocks=num_blocks)
        return self.cache.nbytes

    def capture(self, progress: Callable[[int, int], None], deliver: Callable[[bytes], None]) -> Captured:
        """Captures the decode graphs. `deliver` will get the steps' results, in order, on another thread."""
        free = self._device.memory()[0]
        self._capture_graphs(progress)
        self._graph_bytes = max(0, free - self._device.memory()[0])
        self._flights = Flights(self._buffers, self._device.attach, deliver)
        return Captured(0 if self._graphs is None else len(self._graphs), self._graph_bytes)

    def _capture_graphs(self, progress: Callable[[int, int], None]) -> None:
        self._graphs: Graphs | None = None
        if not self._config.enforce_eager:
            with _out_of_memory(
                "the decode graphs", "lower gpu_memory_utilization, or use enforce_eager=True"
            ):
                self._graphs = Graphs(
                    self._device,
                    self._config.max_num_seqs,
                    self._prepare_padding,
                    self._launch,
                    self._addresses,
                    progress,
                )

    def sleep(self, level: int) -> int:
        """Gives back keys and values, the graphs, and the weights, which go to host memory (level 1) or are
        forgotten (level 2); the bytes of keys, values and weights. No step may be under way.

        Raises OutOfMemoryError, with nothing changed on any rank, where host memory has no room."""
        self._device.synchronize()
        if level == 1 and self._asleep == 0:
            self._park()
        elif level == 2:
            self._weights.clear()
            self._unpark()
        self._asleep = max(level, self._asleep)
        self._give_back()
        return self._sleeping_bytes

    def _give_back(self) -> None:
        self._graphs = None
        self._device.forget_captures()
        if hasattr(self, "cache"):
            del self.cache
        self._device.release()

    def wake_up(self, open_checkpoint: Callable[[], Checkpoint], progress: Callable[[int, int], None]) -> str:
        """Takes again what `sleep` gave back; why that cannot be on some rank, or nothing."""
        if self._asleep == 0:
            return ""
        lacking = self._take_again(open_checkpoint, progress)
        if not lacking:
            self._unpark()
            self._asleep = 0
            return ""
        # Now that no traceback holds what has been taken.
        if self._parked is not None:
            copies = iter(self._parked.copies)
            self._weights.move(lambda _: next(copies))
        else:
            self._weights.clear()
        self._give_back()
        return lacking

    def _take_again(
        self, open_checkpoint: Callable[[], Checkpoint], progress: Callable[[int, int], None]
    ) -> str:
        """What is in host memory stays there too."""
        lacking = ""
        try:
            self._check_waking()
            if self._parked is not None:
                with _out_of_memory("the weights", "use a smaller model or dtype, or free memory"):
                    self._weights.move(lambda tensor: tensor.to(self._device.place, non_blocking=True))
            else:
                parameters, checkpoint = list(self._model.parameters()), open_checkpoint()
                try:
                    sizes = check_weights(self._model, checkpoint)
                    self._fill(parameters, checkpoint, sizes, progress)
                finally:
                    checkpoint.close()
            self.allocate(self._num_blocks)
        except OutOfMemoryError as error:
            lacking = str(error)
        # Graphs are captured by all ranks together, or the others would wait.
        if not self._all_ranks(not lacking):
            return lacking or "another rank's GPU has no room"
        try:
            self._capture_graphs(lambda done, total: None)
        except OutOfMemoryError as error:
            if self._group is not None:
                raise
            lacking = str(error)
        return lacking

    @property
    def _sleeping_bytes(self) -> int:
        return self._num_blocks * self.kv_layout.bytes_per_block + self._weights.expected_bytes

    def _check_waking(self) -> None:
        needed, free = self._sleeping_bytes + self._graph_bytes, self._device.memory()[0]
        if needed > free:
            raise OutOfMemoryError(
                f"{needed:,} bytes of the GPU were given back, graphs included, and {free:,} are free now"
            )

    def _all_ranks(self, fine: bool) -> bool:
        return fine if self._group is None else self._group.agree(fine)

    def _park(self) -> None:
        """Moves the weights to host memory, on all ranks or on none."""
        lacking = ""
        try:
            self._parked = HostMemory(self._device, [tensor.nbytes for tensor in self._weights.tensors()])
        except OutOfMemoryError as error:
            lacking = str(error)
        if not self._all_ranks(not lacking):
            self._unpark()
            raise OutOfMemoryError(lacking or "another rank has no room in host memory for its weights")
        assert self._parked is not None
        self._weights.move(self._parked.take)

    def _unpark(self) -> None:
        if self._parked is not None:
            self._parked.close()
            self._parked = None

    def submit(self, data: bytes) -> None:
        """Launches one plan. Its result is delivered once it is there."""
        plan = parse_plan(data)
        shape = self._batch.shape_of(plan)
        flight = self._flights.take()
        graphs = self._graphs if shape.rows and shape.is_decode else None
        rows = shape.rows if graphs is None else graphs.size_for(shape.rows)
        flight.depart(plan)
        self._batch.apply(plan, flight, self.cache, rows)
        self._device.await_download()
        if graphs is not None:
            graphs.replay(rows)
        elif shape.rows:
            with _out_of_memory("a step", "lower max_num_batched_tokens or gpu_memory_utilization"):
                self._run(self._batch.step(shape))
        sampled = plan.rows[plan.rows[:, 3] & SAMPLE != 0, 0]
        flight.arrive(self._slots.num_logprobs[sampled])
        self._flights.send(flight)

    def close(self) -> None:
        """Waits for what is under way."""
        if hasattr(self, "_flights"):
            self._flights.close()
        self._graphs = None  # NCCL waits for the graphs that hold its kernels
        if self._group is not None:
            self._group.close()

    def _make_buffers(self) -> None:
        config, place = self._config, self._device.place
        spec, rows = config.spec, config.max_num_seqs
        width = -(-config.max_model_len // config.block_size)
        limits = Limits(rows, config.max_num_batched_tokens, config.max_model_len, rows, width, 1)
        self._slots = Slots(self._device, rows, spec.vocab_size)
        self._batch = Batch(self._device, self._slots, limits)
        self._draws = Draws(rows, config.max_logprobs, place)
        # The rows, a record and a new block for each of them, and the tokens with their blocks.
        tokens = config.max_num_batched_tokens
        words = (
            PLAN_HEADER + rows * (ROW_FIELDS + RECORD_STRIDE + 3) + tokens + 3 * tokens // config.block_size
        )
        self._buffers = [Flight(self._device, words, self._draws) for _ in range(FLIGHTS)]
        self._sampling = SamplerWorkspace.allocate(rows, spec.vocab_size, place)
        self._fixtures = Fixtures(
            spec,
            self._shard,
            self._weights,
            torch.from_numpy(cos_sin_table(spec, config.max_model_len)).to(place),
            self._batch.arrays.block_table,
            AttentionWorkspace.allocate(spec.head_dim, place, self._device.attention_programs),
            self._group,
        )

    def _run(self, step: Step) -> None:
        """Launches the model and the sampler."""
        logits = self._model.forward(CudaOps(self._fixtures, self.cache, step))
        if step.shape.samples:
            arrays = self._batch.arrays
            sample(
                logits,
                arrays.slot_params,
                step.sample_slots,
                step.sample_positions,
                arrays.last_token,
                self._draws.first(step.shape.samples),
                self._sampling,
            )

    def _launch(self, rows: int) -> None:
        """A decode step of so many rows, on the inputs that are there."""
        self._run(self._batch.decode_step(rows))

    def _prepare_padding(self, rows: int) -> None:
        empty = np.zeros((0, 4), np.int32)
        none = np.zeros(0, np.int32)
        plan = Plan(0, 0, empty, none.reshape(0, 3), none.reshape(0, 2), none, [])
        self._batch.apply(plan, self._buffers[0], self.cache, rows)

    def _compile(self) -> None:
        """Runs steps of every kind, so that no request waits for a compiler later: attention's kernels depend
        on the longest row up to a tile's size."""
        longest = 1
        while longest <= min(LARGEST_TILE, self._config.max_model_len, self._config.max_num_batched_tokens):
            self._run_dummy(longest, 1)
            self._device.synchronize()  # the next one uses the same flight
            longest *= 2

    def _run_dummy(self, tokens: int, most_rows: int) -> None:
        """A step of so many tokens in as many rows as may be, on the cache's first block."""
        config = self._config
        rows = min(most_rows, tokens)
        counts = np.ones(rows, np.int32)
        left = tokens - rows
        for row in range(rows):
            more = min(left, config.max_model_len - 1)
            counts[row] += more
            left -= more
        flags = np.full(rows, SAMPLE, np.int32)
        described = np.stack([np.arange(rows, dtype=np.int32), np.zeros_like(counts), counts, flags], axis=1)
        none = np.zeros(0, np.int32)
        ids = np.zeros(int(counts.sum()), np.int32)
        plan = Plan(0, 0, described, none.reshape(0, 3), none.reshape(0, 2), ids, [])
        shape = self._batch.shape_of(plan)
        self._batch.apply(plan, self._buffers[0], self.cache, rows)
        self._run(self._batch.step(shape))

    def _addresses(self) -> tuple[int, ...]:
        """Where graphs find what they read and write."""
        keys, values = self.cache.layer(0)
        tensors = (*self._batch.arrays, self._draws.packed, keys, values)
        return tuple(tensor.data_ptr() for tensor in tensors)


def _weights(config: WorkerConfig, device: Device, parameters: list[Parameter]) -> Weights | Offload:
    weights = Weights(device, parameters, config.dtype, config.num_threads)
    if config.cpu_offload_bytes == 0:
        return weights
    return Offload(weights, device, parameters, config.cpu_offload_bytes, TORCH_DTYPES[config.dtype].itemsize)


def _check_config(config: WorkerConfig) -> None:
    spec = config.spec
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 2:
        raise ModelLoadError(
            f"heads of size {spec.head_dim} are not supported on CUDA; supported: even ones up to"
            f" {MAX_HEAD_DIM}; or use device='cpu'"
        )
    if config.quantization is not None:
        raise ConfigError(
            f"quantization={config.quantization!r} is not supported on device 'cuda'; leave it None, which"
            f" dequantizes a GGUF file's weights to dtype, or use device='cpu'",
            parameter="quantization",
            value=config.quantization,
        )
    if spec.packing is not None and config.load_format != "dummy":
        raise ConfigError(
            f"{spec.packing.method} checkpoints are not supported on device 'cuda'; use device='cpu', or the"
            " model's unquantized weights",
            parameter="device",
            value=config.device,
        )
    if config.kv_dtype not in (config.dtype, "fp8_e4m3"):
        raise ConfigError(
            f"kv_cache_dtype={config.kv_dtype!r} is not supported on device 'cuda' with dtype"
            f" {config.dtype!r}; use 'auto' or 'fp8', or device='cpu'",
            parameter="kv_cache_dtype",
            value=config.kv_dtype,
        )
    if config.max_num_samples > config.max_num_seqs:
        raise ConfigError(
            "speculative is not supported on device 'cuda'; leave it None, or use device='cpu'",
            parameter="speculative",
            value=config.max_num_samples,
        )


@contextmanager
def _out_of_memory(what: str, instead: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"the GPU has no room for {what}; {instead} ({error})") from error
