"""What an engine runs with.

`resolve` turns what the caller asked for (`EngineArgs`), the model's spec and this machine into an
`EngineConfig`, a new value in which nothing is left open.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from .args import DTYPES, KV_DTYPES, EngineArgs
from .checkpoint.sharding import check_parallel
from .checkpoint.spec import DType, KVDType, ModelSpec
from .cores import usable_cores
from .gpus import GPU, unusable, visible_gpus
from .speculation import MAX_DRAFT_TOKENS, NgramSpeculation

__all__ = ["EngineConfig", "resolve"]

CPU_BLOCK_SIZE = 32
CPU_BATCHED_TOKENS = 512
CPU_KV_BYTES = 4 << 30
"""KV cache of an engine on a CPU unless the caller sets `kv_cache_memory_bytes`: the host program's
memory is not ours to fill. Pages are taken as they are first used."""
CUDA_BLOCK_SIZES = (64, 32, 16)
"""What the attention kernels are made for, the default first."""
CUDA_BATCHED_TOKENS = 8192

_logger = logging.getLogger("asyncengine")

# name -> (values that are served on a device, what to do instead)
_CPU_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cpu_offload_gb": ((0,), "it moves weights from a GPU, and the weights are in host memory; leave it 0"),
    "disable_custom_all_reduce": ((False,), "it concerns NVIDIA GPUs; leave it False"),
    "kv_cache_dtype": (
        tuple(name for name in ("auto", *KV_DTYPES) if not name.startswith("fp8")),
        "use kv_cache_dtype='int8'",
    ),
}
_CUDA_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization": ((None,), "leave it None for weights in `dtype` (bfloat16), or use device='cpu'"),
    "speculative": ((None,), "leave it None, or use device='cpu'"),
    "block_size": ((None, *CUDA_BLOCK_SIZES), f"use one of {', '.join(map(str, CUDA_BLOCK_SIZES))}"),
}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine runs with; nothing left to default."""

    model: str
    device: str
    dtype: DType
    quantization: str | None
    """int8, int4, or the file's format (as stored); None: no weight is quantized."""
    kv_dtype: KVDType
    max_model_len: int
    """Longest sequence, prompt and output together, in tokens."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    enable_prefix_caching: bool
    kv_cache_memory_bytes: int | None
    gpu_memory_utilization: float
    cpu_offload_bytes: int
    """Of each rank."""
    enforce_eager: bool
    tensor_parallel_size: int
    num_threads: int
    """Compute threads of each rank."""
    seed: int
    scheduling_policy: str
    max_queued_requests: int | None
    max_queued_tokens: int | None
    max_logprobs: int
    speculative: NgramSpeculation | None

    @property
    def max_num_samples(self) -> int:
        """Most positions of a step that are sampled from: one of every sequence, and the drafts."""
        if self.speculative is None:
            return self.max_num_seqs
        drafts = min(MAX_DRAFT_TOKENS, self.max_num_seqs * self.speculative.num_speculative_tokens)
        return min(self.max_num_seqs + drafts, self.max_num_batched_tokens)


def resolve(
    args: EngineArgs, spec: ModelSpec, *, is_gguf: bool = False, gpus: Sequence[GPU] | None = None
) -> EngineConfig:
    """Decides what `args` left open, for a model on this machine. Raises `ConfigError`.

    `gpus`: those that may be used; None asks the driver for them if it matters.
    """
    device = _resolve_device(args, gpus)
    for name, (served, instead) in (_CUDA_UNSERVED if device == "cuda" else _CPU_UNSERVED).items():
        if getattr(args, name) not in served:
            args.refuse(name, f"is not supported on device {device!r}; {instead}")
    stored = _stored_quantization(args, spec, device, is_gguf)
    check_parallel(spec, args.tensor_parallel_size)
    max_model_len = args.max_model_len or spec.max_context
    if max_model_len > spec.max_context:
        args.refuse(
            "max_model_len",
            f"exceeds the {spec.max_context} positions the model was made for; to extend it, declare so "
            "with hf_overrides={'max_position_embeddings': ..., 'rope_parameters': ...}",
        )
    batched = args.max_num_batched_tokens
    if batched is None:
        batched = max(CUDA_BATCHED_TOKENS if device == "cuda" else CPU_BATCHED_TOKENS, args.max_num_seqs)
    elif batched < args.max_num_seqs:
        args.refuse(
            "max_num_batched_tokens",
            f"must be at least max_num_seqs ({args.max_num_seqs}): every running sequence needs one",
        )
    dtype = _resolve_dtype(args, spec, device)
    return EngineConfig(
        model=args.model,
        device=device,
        dtype=dtype,
        quantization=args.quantization or (stored if device == "cpu" and args.dtype == "auto" else None),
        kv_dtype=_resolve_kv_dtype(args, dtype, device),
        max_model_len=max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=batched,
        block_size=args.block_size or (CUDA_BLOCK_SIZES[0] if device == "cuda" else CPU_BLOCK_SIZE),
        enable_prefix_caching=args.enable_prefix_caching,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
        cpu_offload_bytes=int(args.cpu_offload_gb * 2**30),
        enforce_eager=args.enforce_eager,
        tensor_parallel_size=args.tensor_parallel_size,
        num_threads=max(1, (args.num_threads or usable_cores()) // args.tensor_parallel_size),
        seed=args.seed,
        scheduling_policy=args.scheduling_policy,
        max_queued_requests=args.max_queued_requests,
        max_queued_tokens=args.max_queued_tokens,
        max_logprobs=args.max_logprobs,
        speculative=None if args.speculative is None else NgramSpeculation.from_dict(args.speculative),
    )


def _resolve_device(args: EngineArgs, gpus: Sequence[GPU] | None) -> str:
    if args.device == "cpu":
        return "cpu"
    found = visible_gpus() if gpus is None else gpus
    reason = unusable(found)
    if args.device == "auto" and reason is not None:
        if found:  # someone will wonder why it stays idle
            _logger.warning("device='auto' takes the CPU: %s", reason)
        return "cpu"
    if reason is not None:
        args.refuse("device", f"cannot be used: {reason}; or use device='cpu'")
    if len(found) < args.tensor_parallel_size:
        args.refuse("tensor_parallel_size", f"needs as many GPUs, and {len(found)} are visible; lower it")
    return "cuda"


def _stored_quantization(args: EngineArgs, spec: ModelSpec, device: str, is_gguf: bool) -> str | None:
    """The format of the checkpoint's quantized weights, if it has any."""
    packing = None if args.load_format == "dummy" else spec.packing
    if packing is not None and device == "cuda":
        args.refuse(
            "device",
            f"takes a GPU, where {packing.method} checkpoints are not supported; use device='cpu', or the"
            " model's unquantized weights",
        )
    if is_gguf:
        stored: str | None = "gguf"
    else:
        stored = None if packing is None else packing.method
    if args.quantization not in (None, "int8", "int4", stored):
        needed = (
            "GGUF file" if args.quantization == "gguf" else f"checkpoint quantized with {args.quantization}"
        )
        args.refuse("quantization", f"needs a {needed}; other checkpoints take 'int8' or 'int4'")
    return stored


def _resolve_dtype(args: EngineArgs, spec: ModelSpec, device: str) -> DType:
    if args.dtype != "auto":
        return DTYPES[args.dtype]
    # Quantized weights have no type of their own; bfloat16 holds them in half the memory of float32.
    if spec.dtype is None or (device == "cuda" and spec.dtype == "float32"):
        return "bfloat16"
    return spec.dtype


def _resolve_kv_dtype(args: EngineArgs, dtype: DType, device: str) -> KVDType:
    if args.kv_cache_dtype == "auto":
        return dtype
    chosen = KV_DTYPES[args.kv_cache_dtype]
    if device == "cuda" and chosen not in (dtype, "fp8_e4m3"):
        args.refuse("kv_cache_dtype", f"must be 'auto' (here {dtype}) or 'fp8' on device 'cuda'")
    return chosen
