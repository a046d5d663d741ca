"""What the stages of the start ask of a worker and what they report back (see `plan.StageCommand`)."""

import msgspec

from ..checkpoint.spec import DType, KVDType, ModelSpec

__all__ = ["Allocate", "Allocated", "Captured", "Loaded", "Profiled", "WorkerConfig"]


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
    num_threads: int
    """Compute threads of this rank."""
    enforce_eager: bool
    seed: int


class Loaded(msgspec.Struct, frozen=True):
    """Stage `load`: bytes of weights this rank holds."""

    weight_bytes: int


class Profiled(msgspec.Struct, frozen=True):
    """Stage `profile`: what a step needs and what is left, in bytes on this rank."""

    activation_bytes: int
    """Step buffers at `max_num_batched_tokens` tokens and `max_num_samples` samples."""
    bytes_per_block: int
    """Keys and values of one block, all layers of this rank."""
    available_bytes: int
    """Memory the process may still take: free memory, bounded by the cgroup's limit."""


class Allocate(msgspec.Struct, frozen=True):
    """Stage `allocate`: the number of KV blocks, the same on every rank."""

    num_blocks: int


class Allocated(msgspec.Struct, frozen=True):
    """Stage `allocate`: bytes taken for keys and values on this rank."""

    kv_bytes: int


class Captured(msgspec.Struct, frozen=True):
    """Stage `capture`: size of the recorded step program; 0 operations when eager."""

    operations: int
    program_bytes: int
