"""Rotary-embedding parameters out of a Hugging Face configuration.

Precedence and defaults are those of transformers' `modeling_rope_utils.py`.
"""

from .spec import RopeScaling
from .values import Values, refuse

__all__ = ["read_rope"]

_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(values: Values, max_position: int) -> tuple[float, RopeScaling | None]:
    """The base of the frequencies and how they are scaled, if they are.

    Raises `ModelLoadError` for a kind of scaling that is not supported and for values out of range.
    """
    # transformers 5 keeps all of it in `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`,
    # which still wins where both are there.
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        refuse("rope_parameters", given, "must be a JSON object")
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    if nested:
        refuse("rope_parameters", given, "sets rotary embeddings per kind of layer, which is not supported")
    defaults = {
        "rope_theta": values.get("rope_theta"),
        "partial_rotary_factor": values.get("partial_rotary_factor"),
    }
    rope = Values({**defaults, **{key: value for key, value in given.items() if value is not None}})
    if rope.get("partial_rotary_factor") not in (None, 1):
        refuse("partial_rotary_factor", rope.get("partial_rotary_factor"), "is not supported; supported: 1.0")
    theta = 10000.0 if rope.get("rope_theta") is None else rope.real("rope_theta", 1.0 + 1e-6, 1e15)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        refuse("rope_type", kind, f"is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if rope.get("mrope_section") is not None:
        refuse("mrope_section", rope.get("mrope_section"), "is for several modalities and is not supported")
    if kind == "default":
        return theta, None

    # Linear and dynamic scaling are relative to the declared length, whatever else the file says.
    original = max_position
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        for source in (values, rope):
            if source.get(name) is not None:
                original = source.integer(name, 1, 2**31 - 1)
                break
    if kind == "yarn" and rope.get("factor") is None:
        factor = max_position / original
    else:
        factor = rope.real("factor", 1.0, 2.0**20)
    if kind == "linear":
        return theta, RopeScaling(type="linear", factor=factor, original_max_position=original)
    if kind == "dynamic":
        return theta, RopeScaling(type="dynamic", factor=factor, original_max_position=original)
    if kind == "llama3":
        low = rope.real("low_freq_factor", 1e-6, 1e6)
        high = rope.real("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            refuse("high_freq_factor", high, f"must be greater than low_freq_factor={low:g}")
        return theta, RopeScaling(
            type="llama3",
            factor=factor,
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return theta, RopeScaling(
        type="yarn",
        factor=factor,
        original_max_position=original,
        # 0 stands for the default of either.
        beta_fast=_optional(rope, "beta_fast") or 32.0,
        beta_slow=_optional(rope, "beta_slow") or 1.0,
        attention_factor=_optional(rope, "attention_factor"),
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
        truncate=rope.get("truncate") is None or rope.flag("truncate"),
    )


def _optional(rope: Values, name: str) -> float | None:
    return None if rope.get(name) is None else rope.real(name, 0.0, 1e6)
