"""Declarations of a model's weights: which part of which checkpoint tensors this rank needs.

A declaration holds no data. A backend loads it in a form of its own and keeps the result by identity.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Embedding", "Linear", "Parameter", "Source", "Vector"]


class Source(NamedTuple):
    """A tensor of the checkpoint, and the rows (and columns) of it that this rank takes."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, as the checkpoint must have it."""
    rows: range
    columns: range | None = None
    """None takes whole rows."""


@dataclass(frozen=True, eq=False)
class Linear:
    """`x @ weight.T + bias`; several sources are stacked by rows."""

    sources: tuple[Source, ...]
    biases: tuple[Source, ...] = ()
    is_gated: bool = False
    """Two sources of one shape, gate and up: a backend may store them side by side for `gated_linear`."""
    is_head: bool = False
    """Its outputs are logits."""
    in_features: int = field(init=False)
    out_features: int = field(init=False)

    def __post_init__(self) -> None:
        first = self.sources[0]
        width = first.shape[1] if first.columns is None else len(first.columns)
        object.__setattr__(self, "in_features", width)
        object.__setattr__(self, "out_features", sum(len(source.rows) for source in self.sources))


@dataclass(frozen=True, eq=False)
class Embedding:
    """A table of which this rank holds the rows `source.rows`."""

    source: Source

    @property
    def width(self) -> int:
        return self.source.shape[1]


@dataclass(frozen=True, eq=False)
class Vector:
    """Norm weights; float32 on every backend."""

    source: Source

    @property
    def size(self) -> int:
        return len(self.source.rows)


Parameter = Linear | Embedding | Vector
