"""How the CPU holds each weight: in a plain type, or as codes of 4 to 16 bits in groups or whole rows."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from asyncengine._fast.cpu import COMPACT, MOST_WHOLE16, ROUNDED, WHOLE, WHOLE16, source_format

from ...checkpoint.spec import DType
from ...checkpoint.tensor import TensorView
from ...errors import ConfigError, ModelLoadError
from ..models.parameters import Embedding, Linear, Source

__all__ = ["WeightFormat", "choose_formats", "rows_of"]

STORED_GROUP = 32
"""Block size of GGUF's types, or that of their parts."""
LARGEST_GROUP = 128


class WeightFormat(NamedTuple):
    """Type of the packed weight, as `_fast.cpu` names it."""

    dtype: str
    """F32, BF16, F16, Q16, Q8 or Q4."""
    group: int = 0
    """Columns that share a scale; 0 in plain types, WHOLE or WHOLE16 where all of a row do, rotated. COMPACT:
    none, bfloat16 in fewer bits."""
    minimum: bool = False
    """Whether groups have a minimum beside the scale."""

    @property
    def rows(self) -> int:
        """Group size of the quantized rows that linears of this format read; 0 where they read none."""
        return 0 if self.group == COMPACT else self.group


PLAIN: dict[DType, WeightFormat] = {
    "float32": WeightFormat("F32"),
    "bfloat16": WeightFormat("BF16"),
    "float16": WeightFormat("F16"),
}
PAIRS = WeightFormat("Q16", WHOLE16)
"""Of linears in bfloat16 at PAIRS_LEVELS: 16 bits as well, multiplied as pairs of bytes, and more exact."""
PAIRS_LEVELS = {"avx512vnni"}
"""Instruction sets without products of bfloat16, and with those of bytes four times as fast as of floats."""
COMPACTED = WeightFormat("BF16", COMPACT)
"""Of linears in bfloat16 at COMPACT_LEVELS: the same values in three quarters of the memory."""
COMPACT_LEVELS = {"avx2", "avxvnni", "avx512", "avx512bf16"}
"""Instruction sets that find a byte in a table for next to nothing."""
ROUNDED_LEVELS = {"avx512bf16", "neonbf16"}
"""Instruction sets with products of bfloat16, to which whoever makes activations can round them."""
FORMATS = {"int8": WeightFormat("Q8", WHOLE), "int4": WeightFormat("Q4", WHOLE)}
"""Of the linears under `quantization`. Tables and heads are 8 bits wide under both: a wrong choice among
many close tokens costs more than their memory."""


def choose_formats(
    weights: Iterable[Linear | Embedding],
    quantization: str | None,
    dtype: DType,
    stored: Callable[[str], TensorView],
    level: str,
) -> dict[Linear | Embedding, WeightFormat]:
    """`quantization`: None (plain), int8, int4, or the file's format (codes as they are stored). All groups
    have one size, that of the quantized activations. `level`: the instruction set.

    Raises ConfigError where a rank's columns cut through groups, ModelLoadError where codes cannot stay.
    """
    if quantization is None:
        return {weight: _plain(weight, dtype, level) for weight in weights}
    if quantization in FORMATS:
        return {weight: _made(weight, quantization) for weight in weights}
    formats = {weight: _kept([(s, stored(s.name)) for s in _sources(weight)], dtype) for weight in weights}
    group = math.gcd(*(format.group for format in formats.values()))
    return {w: format._replace(group=group) if format.group else format for w, format in formats.items()}


def rows_of(formats: Iterable[WeightFormat], level: str) -> int:
    """The rows that the linears of a model read besides float32 ones: the group size of quantized rows, which
    all quantized weights of a model share, or ROUNDED where all weights are in bfloat16; 0: none."""
    formats = list(formats)
    if level in ROUNDED_LEVELS and all(format.dtype == "BF16" for format in formats):
        return ROUNDED
    return next((format.rows for format in formats if format.rows), 0)


def _plain(weight: Linear | Embedding, dtype: DType, level: str) -> WeightFormat:
    if dtype == "bfloat16" and isinstance(weight, Linear):
        if level in COMPACT_LEVELS:
            return COMPACTED
        if level in PAIRS_LEVELS and weight.in_features <= MOST_WHOLE16:
            return PAIRS
    return PLAIN[dtype]


def _sources(weight: Linear | Embedding) -> tuple[Source, ...]:
    return weight.sources if isinstance(weight, Linear) else (weight.source,)


def _made(weight: Linear | Embedding, quantization: str) -> WeightFormat:
    if isinstance(weight, Embedding) or weight.is_head:
        return FORMATS["int8"]
    return FORMATS[quantization]


def _kept(stored: list[tuple[Source, TensorView]], dtype: DType) -> WeightFormat:
    """The narrowest format that keeps the codes of all sources; plain where one of them has none."""
    known = []
    for source, view in stored:
        format = _coded(source, view) if view.coding is not None else _block(view.dtype)
        if format is None:
            return PLAIN[dtype]
        known.append(format)
    bits, minimum, group = (
        max(f[0] for f in known),
        any(f[1] for f in known),
        math.gcd(*(f[2] for f in known)),
    )
    return WeightFormat(f"Q{bits}", group, minimum)


def _block(stored_type: str) -> tuple[int, bool, int] | None:
    format = source_format(stored_type)
    return None if format is None else (*format, STORED_GROUP)


def _coded(source: Source, view: TensorView) -> tuple[int, bool, int]:
    """Bits, whether there are zero points, and the largest group that the stored ones are a multiple of."""
    assert view.coding is not None
    bits, width, group = view.coding.bits, source.shape[1], view.coding.group
    if view.coding.group_index is not None:
        raise ModelLoadError(
            f"{source.name} has groups of input features that are no neighbours (desc_act), which is not"
            " supported while codes stay as they are stored; set dtype='bfloat16' or quantization='int8' to"
            " have all weights converted, or take a checkpoint made with desc_act=false"
        )
    part = math.gcd(LARGEST_GROUP, 0 if group >= width else group)
    if source.columns is not None and group < width:
        part = math.gcd(part, source.columns.start, source.columns.stop)
        if part < STORED_GROUP:
            raise ConfigError(
                f"tensor_parallel_size gives a rank {len(source.columns)} of the {width} input features of"
                f" {source.name}, which are in groups of {group}: it must be a multiple of {STORED_GROUP};"
                " use fewer ranks, or set dtype='bfloat16' to have the weights dequantized",
                parameter="tensor_parallel_size",
            )
    return bits, view.coding.zeros is not None, part
