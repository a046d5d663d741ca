"""Hugging Face `config.json`, read and checked.

Defaults are those of transformers' configuration classes. What this engine does not implement is
refused by name, never ignored.
"""

import os
from collections.abc import Mapping
from typing import Any, get_args

from ..errors import ConfigError, ModelLoadError
from .packing import read_packing
from .rope import read_rope
from .spec import DType, ModelSpec
from .values import MAX_TOKEN_ID, Values, load_json, refuse, token_ids

__all__ = ["ARCHITECTURES", "apply_overrides", "load_config", "spec_from_config"]

_COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
_LLAMA = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = {
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_key_value_heads": 8,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _COMMON | _LLAMA,
    "MistralForCausalLM": _COMMON | _MISTRAL,
    "Qwen2ForCausalLM": _COMMON | {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": _COMMON | {"num_key_value_heads": 32, "head_dim": 128},
}
ARCHITECTURES = tuple(_DEFAULTS)
_MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}


def load_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `config.json`. Raises `ModelLoadError` where it is missing or not a JSON object."""
    config = load_json(os.path.join(os.fspath(directory), "config.json"))
    if config is None:
        raise ModelLoadError(f"{os.fspath(directory)} holds no config.json; it is not a model directory")
    return config


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration with `hf_overrides` laid over it, key by key.

    Keys of an older or newer layout (`rope_theta`, `rope_scaling`, `torch_dtype`) replace the values they
    stand for, whichever layout `config` has. Keys that are not known are kept, as transformers does.
    """
    if overrides is None:
        return dict(config)
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(
            f"hf_overrides must be a dict of configuration keys, not {type(overrides).__name__}",
            parameter="hf_overrides",
            value=overrides,
        )
    merged = {**config, **overrides}
    if "torch_dtype" in overrides and "dtype" not in overrides:
        merged.pop("dtype", None)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_parameters" not in overrides:
        rope = dict(rope)
        if "rope_scaling" in overrides:
            scaling = merged.pop("rope_scaling")
            if not isinstance(scaling, dict | None):
                refuse("rope_scaling", scaling, "must be a JSON object")
            rope = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
            rope |= scaling or {}
        if "rope_theta" in overrides:
            rope["rope_theta"] = overrides["rope_theta"]
        merged["rope_parameters"] = rope
    if "rope_parameters" in overrides:
        merged.pop("rope_scaling", None)
    return merged


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a Hugging Face configuration describes.

    Raises `ModelLoadError` naming the key whose value is missing, out of range, or asks for something that
    is not supported.
    """
    architecture = _architecture(config)
    values = Values(_DEFAULTS[architecture] | dict(config))
    if values.get("hidden_act") != "silu":
        refuse("hidden_act", values.get("hidden_act"), "is not supported; supported: silu")

    hidden_size = values.integer("hidden_size", 1, 2**20)
    num_layers = values.integer("num_hidden_layers", 1, 4096)
    num_heads = values.integer("num_attention_heads", 1, 2**16)
    num_kv_heads = num_heads
    if values.get("num_key_value_heads") is not None:
        num_kv_heads = values.integer("num_key_value_heads", 1, num_heads)
    if num_heads % num_kv_heads:
        refuse("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}")
    if values.get("head_dim") is not None:
        head_dim = values.integer("head_dim", 2, 2**14)
    elif hidden_size % num_heads:
        refuse("num_attention_heads", num_heads, f"must divide hidden_size={hidden_size}")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        refuse("head_dim", head_dim, "must be even for rotary embeddings")

    max_position = values.integer("max_position_embeddings", 1, 2**31 - 1)
    rope_theta, rope_scaling = read_rope(values, max_position)
    qwen2, llama = architecture == "Qwen2ForCausalLM", architecture == "LlamaForCausalLM"
    attention_bias = values.flag("attention_bias") and architecture in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
    )
    bos = values.get("bos_token_id")
    return ModelSpec(
        architecture=architecture,
        vocab_size=values.integer("vocab_size", 1, 2**24),
        hidden_size=hidden_size,
        intermediate_size=values.integer("intermediate_size", 1, 2**22),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=values.real("rms_norm_eps", 0.0, 1.0),
        hidden_act="silu",
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position=max_position,
        tie_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or qwen2,
        output_bias=attention_bias,
        mlp_bias=values.flag("mlp_bias") and llama,
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_windows=_sliding_windows(architecture, values, num_layers),
        dtype=_dtype(config),
        packing=read_packing(config),
        bos_token_id=None if bos is None else values.integer("bos_token_id", 0, MAX_TOKEN_ID),
        eos_token_ids=token_ids(values.get("eos_token_id")),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if named is None:
        model_type = config.get("model_type")
        if isinstance(model_type, str) and model_type in _MODEL_TYPES:
            return _MODEL_TYPES[model_type]
        refuse("model_type", model_type, f"is not supported; supported: {', '.join(_MODEL_TYPES)}")
    if isinstance(named, list):
        for name in named:
            if isinstance(name, str) and name in _DEFAULTS:
                return name
    refuse("architectures", named, f"is not supported; supported: {', '.join(ARCHITECTURES)}")


def _sliding_windows(architecture: str, values: Values, num_layers: int) -> tuple[int, ...]:
    nowhere = (0,) * num_layers
    if architecture == "LlamaForCausalLM" or values.get("sliding_window") is None:
        return nowhere
    if architecture == "MistralForCausalLM":
        return (values.integer("sliding_window", 1, 2**31 - 1),) * num_layers
    if not values.flag("use_sliding_window"):
        return nowhere
    window = values.integer("sliding_window", 1, 2**31 - 1)
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.integer("max_window_layers", 0, 2**31 - 1)
        return tuple(0 if layer < first else window for layer in range(num_layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        refuse("layer_types", kinds, f"must name {num_layers} layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            refuse("layer_types", kind, f"is not supported; supported: {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _dtype(config: Mapping[str, Any]) -> DType | None:
    value = config.get("dtype", config.get("torch_dtype"))
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    for known in get_args(DType):
        if name == known:
            found: DType = known
            return found
    refuse("dtype", value, f"is not supported; supported: {', '.join(get_args(DType))}")
