"""How the CPU holds each weight: in a plain type, or as 8-bit or 4-bit codes in groups."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from asyncengine._fast.cpu import WHOLE, source_format

from ...checkpoint.spec import DType
from ..models.parameters import Embedding, Linear

__all__ = ["WeightFormat", "choose_format"]

STORED_GROUP = 32
"""Block size of GGUF's types, or that of their parts."""


class WeightFormat(NamedTuple):
    """Type of the packed weight, as `_fast.cpu` names it."""

    dtype: str
    """F32, BF16, F16, Q8 or Q4."""
    group: int = 0
    """Columns that share a scale; 0 in plain types, WHOLE where all of a row do, rotated."""
    minimum: bool = False
    """Whether groups have a minimum beside the scale."""


PLAIN: dict[DType, WeightFormat] = {
    "float32": WeightFormat("F32"),
    "bfloat16": WeightFormat("BF16"),
    "float16": WeightFormat("F16"),
}
FORMATS = {"int8": WeightFormat("Q8", WHOLE), "int4": WeightFormat("Q4", 32, True)}
"""Of the linears under `quantization`. Tables and heads are 8 bits wide under both: a wrong choice among
many close tokens costs more than their memory."""


def choose_format(
    weight: Linear | Embedding, quantization: str | None, dtype: DType, stored_type: Callable[[str], str]
) -> WeightFormat:
    """`quantization`: None (plain), int8, int4, or gguf (codes as they are stored)."""
    if quantization is None:
        return PLAIN[dtype]
    sources = weight.sources if isinstance(weight, Linear) else (weight.source,)
    if quantization == "gguf":
        return _stored(stored_type(source.name) for source in sources) or PLAIN[dtype]
    if isinstance(weight, Embedding) or weight.is_head:
        return FORMATS["int8"]._replace(group=FORMATS[quantization].group)
    return FORMATS[quantization]


def _stored(types: Iterable[str]) -> WeightFormat | None:
    """The narrowest format that keeps the codes of all `types`; None where one of them has none."""
    codes = [source_format(type_) for type_ in types]
    known = [code for code in codes if code is not None]
    if len(known) < len(codes):
        return None
    bits = max(bits for bits, _ in known)
    return WeightFormat(f"Q{bits}", STORED_GROUP, any(minimum for _, minimum in known))
