"""Engine arguments: every field checked once, here, when `EngineArgs` is made."""

import os
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from .checkpoint.spec import DType, KVDType
from .errors import ConfigError
from .speculation import NgramSpeculation

__all__ = ["DTYPES", "KV_DTYPES", "EngineArgs"]

_LIMIT = 2**31 - 1
DTYPES: dict[str, DType] = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
KV_DTYPES: dict[str, KVDType] = {**DTYPES, "int8": "int8", "fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}


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
    """Type of weights and cache; `auto` is that of the checkpoint (on CUDA bfloat16 for float32 ones). CPUs
    with VNNI but no bfloat16 instructions hold bfloat16 weights as integers of 16 bits, which is more exact.
    Quantized files (GGUF, AWQ, GPTQ, compressed-tensors) keep their weights under `auto` on a CPU, and are
    dequantized to any other, unless `quantization` says more; on CUDA GGUF is always dequantized, under
    `auto` to bfloat16, and the others are refused."""
    quantization: str | None = None
    """`int8` or `int4`: weights of any checkpoint are quantized as they are loaded, and multiplied in
    integers; `gguf`, `awq`, `gptq`, `compressed-tensors`: the weights of such a file stay as they are stored,
    whatever `dtype`, which is more accurate than new codes of 4 bits. On a CPU only."""
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
    "dtype": ("auto", *DTYPES),
    "kv_cache_dtype": ("auto", *KV_DTYPES),
    "quantization": (None, "int8", "int4", "gguf", "awq", "gptq", "compressed-tensors"),
    "device": ("auto", "cpu", "cuda"),
    "scheduling_policy": ("fcfs", "priority"),
}
# name -> (values that are served, what to do instead)
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "swap_space": ((0,), "preempted requests are recomputed, never swapped; leave it 0"),
    "data_parallel_size": ((1,), "create several engines instead"),
    "enable_expert_parallel": ((False,), "no mixture-of-experts model is served yet"),
    "runner": (("auto", "generate"), "only text generation is served; use runner='generate'"),
    "convert": (("auto", "none"), "only text generation is served; use convert='none'"),
}
