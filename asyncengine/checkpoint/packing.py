"""`quantization_config` of AWQ, GPTQ and compressed-tensors checkpoints, read and checked.

Which modules are quantized is what the file holds: lists of exceptions (`modules_to_not_convert`, `ignore`,
`lm_head`, `dynamic` with "-:") say nothing that it does not show. What would make a module's codes mean
something else is read, or refused by name.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from .spec import WeightPacking
from .values import refuse

__all__ = ["read_packing"]

_INSTEAD = "is not supported; take the model's unquantized weights, a GGUF, or another quantization of it"


def read_packing(config: Mapping[str, Any]) -> WeightPacking | None:
    """How a checkpoint's weights are quantized; None: they are not.

    Raises `ModelLoadError` naming the key that asks for what is not supported.
    """
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        refuse("quantization_config", quantization, "must be a JSON object")
    method = quantization.get("quant_method")
    for known, reader in (("awq", _awq), ("gptq", _gptq), ("compressed-tensors", _compressed)):
        if method == known:
            return reader(quantization)
    _refuse("quant_method", method)


def _awq(values: Mapping[str, Any]) -> WeightPacking:
    _only(values, "version", "gemm", "GEMM")
    _only(values, "format", "gemm")
    if values.get("backend") == "llm-awq":
        _refuse("backend", "llm-awq")
    return WeightPacking(method="awq", bits=_bits(values, "bits", 4), group_size=_group(values, 128))


def _gptq(values: Mapping[str, Any]) -> WeightPacking:
    kind = values.get("checkpoint_format") or values.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        _refuse("checkpoint_format", kind)
    _only(values, "is_marlin_format", False)
    _only(values, "pack_dtype", "int32")
    rules = values.get("dynamic") or {}
    if not isinstance(rules, dict) or not all(rule.startswith("-:") for rule in rules):
        _refuse("dynamic", rules)  # modules with bits and groups of their own
    # The first format was written by a tool that took 1 off.
    shift = 1 if kind == "gptq" else 0
    bits = _bits(values, "bits", 4, 8)
    return WeightPacking(method="gptq", bits=bits, group_size=_group(values, 128), zero_shift=shift)


def _compressed(values: Mapping[str, Any]) -> WeightPacking:
    _only(values, "format", "pack-quantized")
    for key in ("kv_cache_scheme", "transform_config"):
        if values.get(key):
            _refuse(key, values[key])
    sparsity = values.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        _refuse("sparsity_config", sparsity)
    schemes = values.get("config_groups")
    if not isinstance(schemes, dict) or not all(isinstance(s, dict) for s in schemes.values()) or not schemes:
        _refuse("config_groups", schemes)
    found = {_scheme(f"config_groups.{name}", scheme) for name, scheme in schemes.items()}
    if len(found) > 1:
        _refuse("config_groups", schemes)
    return found.pop()


def _scheme(path: str, scheme: Mapping[str, Any]) -> WeightPacking:
    for key in ("input_activations", "output_activations"):
        if scheme.get(key):
            _refuse(f"{path}.{key}", scheme[key])
    if scheme.get("format") not in (None, "pack-quantized"):
        _refuse(f"{path}.format", scheme["format"])
    weights = scheme.get("weights")
    if not isinstance(weights, dict):
        _refuse(f"{path}.weights", weights)
    path += ".weights"
    _only(weights, "type", "int", path=path)
    _only(weights, "dynamic", False, path=path)
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        _refuse(f"{path}.strategy", strategy)
    return WeightPacking(
        method="compressed-tensors",
        bits=_bits(weights, "num_bits", 4, 8, path=path),
        group_size=-1 if strategy == "channel" else _group(weights, None, path=path),
    )


def _bits(values: Mapping[str, Any], key: str, *served: int, path: str = "") -> int:
    bits = values.get(key)
    if isinstance(bits, bool) or bits not in served:
        _refuse(f"{path}.{key}" if path else key, bits)
    return int(bits)


def _group(values: Mapping[str, Any], default: int | None, path: str = "") -> int:
    size = values.get("group_size", default)
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and (size < 32 or size % 32)):
        key = f"{path}.group_size" if path else "group_size"
        refuse(f"quantization_config.{key}", size, "must be a multiple of 32, or -1")
    return size


def _only(values: Mapping[str, Any], key: str, *served: Any, path: str = "") -> None:
    """Refuses a key that is there with another value."""
    if values.get(key) is not None and values[key] not in served:
        _refuse(f"{path}.{key}" if path else key, values[key])


def _refuse(key: str, value: Any) -> NoReturn:
    refuse(f"quantization_config.{key}", value, _INSTEAD)
