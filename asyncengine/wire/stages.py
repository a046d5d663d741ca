"""What the stages of the start ask of a worker and what they report back (see `plan.StageCommand`)."""

import msgspec

from ..checkpoint.spec import DType, KVDType, ModelSpec

__all__ = [
    "Allocate",
    "Allocated",
    "Captured",
    "DeviceMemory",
    "Loaded",
    "Profiled",
    "Sleep",
    "Slept",
    "Woken",
    "WorkerConfig",
]


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Stage `config`: everything a rank needs to know; nothing is passed further down than used."""

    spec: ModelSpec
    weights: str
    """Path of the GGUF file or of the directory that holds the safetensors; unused for `dummy`."""
    load_format: str
    """safetensors | gguf | dummy."""
    device: str
    dtype: DType
    """Type of the weights that are not quantized."""
    quantization: str | None
    """gguf (as stored), int8 or int4; None: no weight is quantized."""
    kv_dtype: KVDType
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_samples: int
    """Most positions of a step that are sampled from."""
    max_logprobs: int
    """Most log-probabilities that a sample reports beside its own."""
    num_threads: int
    """Compute threads of this rank."""
    enforce_eager: bool
    seed: int
    cpu_offload_bytes: int = 0
    """CUDA: bytes of weights that this rank keeps in pinned host memory."""


class Loaded(msgspec.Struct, frozen=True):
    """Stage `load`: bytes of weights this rank holds."""

    weight_bytes: int


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What `profile` measured of a rank's GPU, in bytes."""

    total_bytes: int
    start_bytes: int
    """Free when the rank had started: its CUDA context was there, no weight yet."""
    weight_bytes: int
    """Weights on the device, without those that stay in host memory."""
    graph_bytes: int
    """What the decode graphs will take, as estimated before they are captured; 0 when eager."""


class Profiled(msgspec.Struct, frozen=True):
    """Stage `profile`: what a step needs and what is left, in bytes on this rank."""

    activation_bytes: int
    """Step buffers at `max_num_batched_tokens` tokens and `max_num_samples` samples, the sampler's too."""
    bytes_per_block: int
    """Keys and values of one block, all layers of this rank."""
    available_bytes: int
    """Memory the process may still take: free memory, bounded by the cgroup's limit; on CUDA, what is free
    on the device now, with weights, libraries and nothing else of ours on it."""
    device: DeviceMemory | None = None
    """On CUDA only."""


class Allocate(msgspec.Struct, frozen=True):
    """Stage `allocate`: the number of KV blocks, the same on every rank."""

    num_blocks: int


class Allocated(msgspec.Struct, frozen=True):
    """Stage `allocate`: bytes taken for keys and values on this rank."""

    kv_bytes: int


class Captured(msgspec.Struct, frozen=True):
    """Stage `capture`: size of the recorded step program; 0 operations when eager."""

    operations: int
    """Of the CPU's program; on CUDA, the number of graphs."""
    program_bytes: int
    """Measured, of the program or of the graphs with their memory pool."""


class Sleep(msgspec.Struct, frozen=True):
    """Stage `sleep`, when no step is in flight: gives memory back."""

    level: int
    """1: keys and values, and on CUDA the weights, which move to host memory. 2: the weights too, which
    `wake_up` loads anew."""


class Slept(msgspec.Struct, frozen=True):
    """Stage `sleep`: bytes given back by this rank."""

    nbytes: int
    lacking: str = ""
    """Why nothing was given back: host memory has no room for the weights."""


class Woken(msgspec.Struct, frozen=True):
    """Stage `wake_up`: everything is taken again, or nothing. Too little memory is no fault of the rank: it
    sleeps on."""

    lacking: str
    """Why nothing was taken, with the sums; empty where all was."""
