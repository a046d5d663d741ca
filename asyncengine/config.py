"""Engine arguments: every field checked once, here, when `EngineArgs` is made.

`EngineArgs` is what the caller asked for; `resolve` turns it, the model's spec and this machine into an
`EngineConfig`, a new value in which nothing is left open. Both are frozen.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from .checkpoint.sharding import check_parallel
from .checkpoint.spec import DType, KVDType, ModelSpec
from .cores import usable_cores
from .errors import ConfigError
from .gpus import GPU, unusable, visible_gpus

__all__ = ["EngineArgs", "EngineConfig", "NgramSpeculation", "resolve"]

CPU_BLOCK_SIZE = 32
CPU_BATCHED_TOKENS = 512
CPU_KV_BYTES = 4 << 30
"""KV cache of an engine on a CPU unless the caller sets `kv_cache_memory_bytes`: the host program's
memory is not ours to fill. Pages are taken as they are first used."""
CUDA_BLOCK_SIZES = (64, 32, 16)
"""What the attention kernels are made for, the default first."""
CUDA_BATCHED_TOKENS = 8192

_LIMIT = 2**31 - 1
_DTYPES: dict[str, DType] = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
_KV_DTYPES: dict[str, KVDType] = {**_DTYPES, "int8": "int8", "fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}

_logger = logging.getLogger("asyncengine")


MAX_DRAFT_TOKENS = 64
"""Draft tokens of one step, all sequences together: by then a CPU has long ceased to give any for free."""


class NgramSpeculation(msgspec.Struct, frozen=True, kw_only=True):
    """Speculation by prompt lookup: what followed the last occurrence of a sequence's last tokens is drafted
    and verified in one step. Accepted tokens are those that would have been drawn without it."""

    num_speculative_tokens: int = 8
    """Most draft tokens of a sequence in a step; how many it gets follows from what was accepted of late."""
    prompt_lookup_max: int = 4
    """Longest run of last tokens that is looked for; shorter ones follow, down to `prompt_lookup_min`."""
    prompt_lookup_min: int = 2

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "NgramSpeculation":
        """The engine argument `speculative` as a value. Raises `ConfigError`."""

        def refuse(rule: str) -> NoReturn:
            raise ConfigError(f"speculative={value!r} {rule}", parameter="speculative", value=value)

        if value.get("method") != "ngram":
            refuse("must have 'method': 'ngram', the one that is served")
        for name, number in value.items():
            if name == "method":
                continue
            if name not in _SPECULATIVE_RANGES:
                refuse(
                    f"has {name!r}, which is not one of its keys: method, {', '.join(_SPECULATIVE_RANGES)}"
                )
            low, high = _SPECULATIVE_RANGES[name]
            if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
                refuse(f"must have {name!r} as an integer in [{low}, {high}]")
        numbers = {name: number for name, number in value.items() if name != "method"}
        if "prompt_lookup_min" not in numbers:
            numbers["prompt_lookup_min"] = min(2, numbers.get("prompt_lookup_max", 2))
        if "prompt_lookup_max" not in numbers:
            numbers["prompt_lookup_max"] = max(4, numbers["prompt_lookup_min"])
        made = cls(**numbers)
        if made.prompt_lookup_min > made.prompt_lookup_max:
            refuse("must have 'prompt_lookup_min' at most 'prompt_lookup_max'")
        return made


_SPECULATIVE_RANGES = {
    "num_speculative_tokens": (1, MAX_DRAFT_TOKENS),
    "prompt_lookup_max": (1, 32),
    "prompt_lookup_min": (1, 32),
}


class EngineArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `AsyncLLM.create`. Raises `ConfigError` naming the wrong one."""

    model: str
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"
    tokenizer_revision: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    download_dir: str | None = None
    hf_token: str | bool | None = None
    hf_overrides: dict[str, Any] | None = None
    trust_remote_code: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    """Type of weights and cache; `auto` is that of the checkpoint (on CUDA bfloat16 for float32 ones).
    Quantized files (GGUF, AWQ, GPTQ, compressed-tensors) keep their weights under `auto` on a CPU, and are
    dequantized to any other, unless `quantization` says more; on CUDA GGUF is always dequantized, under
    `auto` to bfloat16, and the others are refused."""
    quantization: str | None = None
    """`int8` or `int4`: weights of any checkpoint are quantized as they are loaded, and multiplied in
    integers; `gguf`, `awq`, `gptq`, `compressed-tensors`: the weights of such a file stay as they are stored,
    whatever `dtype`. On a CPU only."""
    kv_cache_dtype: str = "auto"
    """`int8` (on a CPU) halves the cache, each token and head has a scale; so does `fp8` (on CUDA)."""
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    """The share of each GPU's memory that is for this engine, whatever others use of the rest; on a CPU, of
    the memory now free."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of the KV cache: of all ranks together on a CPU, on each GPU on CUDA. None: from
    `gpu_memory_utilization`."""
    cpu_offload_gb: float = 0
    """GiB of the weights that each rank keeps in pinned host memory and copies to its GPU for each use."""
    swap_space: float = 0
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    disable_custom_all_reduce: bool = False
    device: str = "auto"
    """`auto`: `cuda` where there are an NVIDIA GPU from Ampere on and the packages of the `cuda` extra, as
    found without loading torch; else `cpu`."""
    num_threads: int | None = None
    """Compute threads in all ranks together; None: the physical cores this process may use."""
    seed: int = 0
    """Requests without a seed of their own draw from this one and their number in order of arrival."""
    runner: str = "auto"
    convert: str = "auto"
    scheduling_policy: str = "fcfs"
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    generation_config: str = "auto"
    """`auto`: sampling defaults from the model's generation_config.json; `vllm`: none; or a directory."""
    max_logprobs: int = 20
    speculative: dict[str, Any] | None = None
    """`{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}`:
    drafts tokens from the sequence's own text and verifies them in one step, which makes text that repeats
    itself or its prompt come faster; see `NgramSpeculation`. It drafts as much as raises the tokens per
    second, judged by measured times. The output is the same with and without. Requests with penalties,
    which change with every token, are not drafted for."""

    @classmethod
    def from_fields(cls, model: Any, fields: Mapping[str, Any]) -> "EngineArgs":
        """`AsyncLLM.create(model, **fields)` as a value."""
        if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
            raise ConfigError(
                "model must be a Hub id, a local directory or a .gguf file", parameter="model", value=model
            )
        for name, value in fields.items():
            if name not in cls.__struct_fields__ or name == "model":
                raise ConfigError(
                    f"{name!r} is not an engine argument; known: {', '.join(cls.__struct_fields__[1:])}",
                    parameter=name,
                    value=value,
                )
        values = dict(fields)
        if type(values.get("dtype")).__module__ == "torch":
            values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        for name in ("tokenizer", "download_dir", "generation_config"):
            if isinstance(values.get(name), os.PathLike):
                values[name] = os.fspath(values[name])
        return cls(model=os.fspath(model), **values)

    def __post_init__(self) -> None:
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                named = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
                self.refuse(name, f"must be {named}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                self.refuse(name, f"must lie in [{low}, {high}]")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                self.refuse(name, f"must be one of {', '.join(map(repr, choices))}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            self.refuse("gpu_memory_utilization", "must lie in (0, 1]")
        if not 0.0 <= self.cpu_offload_gb < float("inf"):
            self.refuse("cpu_offload_gb", "must be a finite number of GiB, 0 or more")
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            self.refuse("block_size", "must be a power of two")
        for name, (served, instead) in _UNSERVED.items():
            if getattr(self, name) not in served:
                self.refuse(name, f"is not supported in this version; {instead}")

        if self.speculative is not None:
            NgramSpeculation.from_dict(self.speculative)

    def refuse(self, name: str, rule: str) -> NoReturn:
        value = getattr(self, name)
        raise ConfigError(f"{name}={value!r} {rule}", parameter=name, value=value)


_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "tokenizer": (str, _NONE),
    "tokenizer_mode": (str,),
    "tokenizer_revision": (str, _NONE),
    "skip_tokenizer_init": (bool,),
    "revision": (str, _NONE),
    "download_dir": (str, _NONE),
    "hf_token": (str, bool, _NONE),
    "hf_overrides": (dict, _NONE),
    "trust_remote_code": (bool,),
    "load_format": (str,),
    "dtype": (str,),
    "quantization": (str, _NONE),
    "kv_cache_dtype": (str,),
    "max_model_len": (int, _NONE),
    "max_num_seqs": (int,),
    "max_num_batched_tokens": (int, _NONE),
    "block_size": (int, _NONE),
    "enable_prefix_caching": (bool,),
    "gpu_memory_utilization": (int, float),
    "kv_cache_memory_bytes": (int, _NONE),
    "cpu_offload_gb": (int, float),
    "swap_space": (int, float),
    "enforce_eager": (bool,),
    "tensor_parallel_size": (int,),
    "data_parallel_size": (int,),
    "enable_expert_parallel": (bool,),
    "disable_custom_all_reduce": (bool,),
    "device": (str,),
    "num_threads": (int, _NONE),
    "seed": (int,),
    "runner": (str,),
    "convert": (str,),
    "scheduling_policy": (str,),
    "max_queued_requests": (int, _NONE),
    "max_queued_tokens": (int, _NONE),
    "generation_config": (str,),
    "max_logprobs": (int,),
    "speculative": (dict, _NONE),
}
_RANGES = {
    "max_model_len": (1, _LIMIT),
    "max_num_seqs": (1, 1 << 16),
    "max_num_batched_tokens": (1, 1 << 20),
    "block_size": (1, 1024),
    "kv_cache_memory_bytes": (1, 2**62),
    "tensor_parallel_size": (1, 64),
    "num_threads": (1, 1024),
    "seed": (-(2**63), 2**63 - 1),
    "max_queued_requests": (1, _LIMIT),
    "max_queued_tokens": (1, 2**62),
    "max_logprobs": (0, 1024),
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "tokenizer_mode": ("auto",),
    "load_format": ("auto", "safetensors", "gguf", "dummy"),
    "dtype": ("auto", *_DTYPES),
    "kv_cache_dtype": ("auto", *_KV_DTYPES),
    "quantization": (None, "int8", "int4", "gguf", "awq", "gptq", "compressed-tensors"),
    "device": ("auto", "cpu", "cuda"),
    "scheduling_policy": ("fcfs", "priority"),
}
# name -> (values that are served, what to do instead); on one of the devices, for the last two
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "swap_space": ((0,), "preempted requests are recomputed, never swapped; leave it 0"),
    "data_parallel_size": ((1,), "create several engines instead"),
    "enable_expert_parallel": ((False,), "no mixture-of-experts model is served yet"),
    "runner": (("auto", "generate"), "only text generation is served; use runner='generate'"),
    "convert": (("auto", "none"), "only text generation is served; use convert='none'"),
}


_CPU_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cpu_offload_gb": ((0,), "it moves weights from a GPU, and the weights are in host memory; leave it 0"),
    "disable_custom_all_reduce": ((False,), "it concerns NVIDIA GPUs; leave it False"),
    "kv_cache_dtype": (
        tuple(name for name in ("auto", *_KV_DTYPES) if not name.startswith("fp8")),
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
        return _DTYPES[args.dtype]
    # Quantized weights have no type of their own; bfloat16 holds them in half the memory of float32.
    if spec.dtype is None or (device == "cuda" and spec.dtype == "float32"):
        return "bfloat16"
    return spec.dtype


def _resolve_kv_dtype(args: EngineArgs, dtype: DType, device: str) -> KVDType:
    if args.kv_cache_dtype == "auto":
        return dtype
    chosen = _KV_DTYPES[args.kv_cache_dtype]
    if device == "cuda" and chosen not in (dtype, "fp8_e4m3"):
        args.refuse("kv_cache_dtype", f"must be 'auto' (here {dtype}) or 'fp8' on device 'cuda'")
    return chosen
