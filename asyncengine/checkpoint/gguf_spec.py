"""The model that a GGUF file describes.

Metadata keys are translated into a Hugging Face configuration and read by `spec_from_config`, so that
overrides, ranges and defaults are the same for both formats. Key names and defaults are llama.cpp's.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from ..errors import ModelLoadError
from .config import apply_overrides, spec_from_config
from .gguf import GGUFFile
from .gguf_header import SUPPORTED
from .spec import DType, ModelSpec

__all__ = ["config_from_gguf", "spec_from_gguf"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_FLOAT_TYPES: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_END_OF_TEXT = ("eos", "eot", "eom")


def spec_from_gguf(gguf: GGUFFile, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model in a GGUF file, with `hf_overrides` applied to its Hugging Face form.

    Raises `ModelLoadError` where the file describes something that is not supported.
    """
    spec = spec_from_config(apply_overrides(config_from_gguf(gguf), overrides))
    rope_factors = gguf.rope_factors
    if rope_factors is not None and len(rope_factors) != spec.head_dim // 2:
        raise ModelLoadError(
            f"{gguf.path} has {len(rope_factors)} rotary factors, but heads of {spec.head_dim} elements"
        )
    held = frozenset(gguf.names())
    layer = "model.layers.0."
    return msgspec.structs.replace(
        spec,
        rope_factors=rope_factors,
        qkv_bias=layer + "self_attn.q_proj.bias" in held,
        output_bias=layer + "self_attn.o_proj.bias" in held,
        mlp_bias=layer + "mlp.gate_proj.bias" in held,
        dtype=_dtype(gguf),
    )


def config_from_gguf(gguf: GGUFFile) -> dict[str, Any]:
    """The Hugging Face configuration that says what the GGUF metadata says."""
    metadata = gguf.metadata
    arch = gguf.architecture
    if arch not in _ARCHITECTURES:
        _refuse(gguf, f"architecture {arch!r}; supported: {', '.join(_ARCHITECTURES)}")
    config: dict[str, Any] = {
        name: metadata[f"{arch}.{key}"] for key, name in _KEYS.items() if f"{arch}.{key}" in metadata
    }
    if metadata.get(f"{arch}.expert_count"):
        _refuse(gguf, f"a mixture of {metadata[f'{arch}.expert_count']} experts")
    # llama.cpp has one architecture for Llama and Mistral, and as many KV heads as heads by default.
    window = metadata.get(f"{arch}.attention.sliding_window")
    mistral = arch == "llama" and bool(window)
    if window and not mistral:
        _refuse(gguf, f"{arch}.attention.sliding_window={window}")
    config["architectures"] = ["MistralForCausalLM" if mistral else _ARCHITECTURES[arch]]
    if mistral:
        config["sliding_window"] = window
    config.setdefault("num_key_value_heads", None)
    config.setdefault("head_dim", None)
    config["vocab_size"] = gguf.info("model.embed_tokens.weight").shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in gguf.names()
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _END_OF_TEXT)
    config["eos_token_id"] = [token for token in ends if token is not None]
    config["rope_parameters"] = _rope(gguf, arch)

    head_dim = config["head_dim"]
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_dim = hidden // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        value = metadata.get(f"{arch}.{key}", head_dim)
        if value != head_dim:
            _refuse(gguf, f"{arch}.{key}={value} beside heads of {head_dim}")
    return config


def _rope(gguf: GGUFFile, arch: str) -> dict[str, Any]:
    prefix = f"{arch}.rope."
    rope = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    theta = {"rope_theta": rope.get("freq_base", 10000.0)}
    kind = rope.get("scaling.type", "linear")
    factor = rope.get("scaling.factor", rope.get("scale_linear", 0.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return theta
    if kind == "linear":
        return theta | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        _refuse(gguf, f"{prefix}scaling.type={kind!r}; supported: none, linear, yarn")
    if rope.get("scaling.yarn_log_multiplier") or rope.get("scaling.yarn_ext_factor", 1.0) != 1.0:
        _refuse(gguf, f"YaRN with {prefix}scaling.yarn_log_multiplier or yarn_ext_factor")
    attention = rope.get("scaling.yarn_attn_factor", rope.get("scaling.attn_factor", 1.0))
    yarn = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": rope.get("scaling.original_context_length"),
        "beta_fast": rope.get("scaling.yarn_beta_fast"),
        "beta_slow": rope.get("scaling.yarn_beta_slow"),
    }
    if attention != 1.0:
        # llama.cpp scales YaRN's own factor by this one.
        if not (isinstance(attention, float) and isinstance(factor, float) and factor >= 1.0):
            _refuse(gguf, f"YaRN with an attention factor of {attention!r} and a factor of {factor!r}")
        yarn["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return theta | yarn


def _dtype(gguf: GGUFFile) -> DType | None:
    """The one type of all matrices, else None: norms are float32 in every file."""
    types: set[str] = set()
    for name in gguf.names():
        info = gguf.info(name)
        if info.dtype not in SUPPORTED:
            _refuse(gguf, f"tensors of type {info.dtype}; supported: {', '.join(sorted(SUPPORTED))}")
        if len(info.shape) > 1:
            types.add(info.dtype)
    if not types <= _FLOAT_TYPES.keys():
        return None
    if len(types) > 1:
        types.discard("F32")
    return _FLOAT_TYPES[types.pop()] if len(types) == 1 else "float32"


def _refuse(gguf: GGUFFile, what: str) -> NoReturn:
    raise ModelLoadError(f"{gguf.path} has {what}; this is not supported")
