"""The operations a model's forward is written in.

`T` is the backend's own tensor: on the CPU a handle of a buffer while the step program is recorded.
Rows are the step's tokens until `select` leaves only those that are sampled from. A tensor's memory is
taken again once the model has dropped its last reference. All activations are float32 or the
backend's choice; shapes below are [rows, columns].
"""

from typing import Protocol, TypeVar

from ..models.parameters import Embedding, Linear, Vector

__all__ = ["Ops"]

T = TypeVar("T")


class Ops(Protocol[T]):
    """What a backend offers to a model."""

    def embed(self, table: Embedding) -> T:
        """Rows of `table` for the step's token ids; zeros where another rank has them. [tokens, H]"""
        ...

    def rms_norm(self, x: T, weight: Vector) -> T:
        """`x / sqrt(mean(x^2) + eps) * weight`"""
        ...

    def linear(self, x: T, weight: Linear) -> T:
        """`x @ weight.T + bias`"""
        ...

    def add_linear(self, residual: T, x: T, weight: Linear) -> None:
        """`residual += x @ weight.T + bias`, where every rank has some of the inputs: their sum."""
        ...

    def gated_linear(self, x: T, weight: Linear) -> T:
        """`silu(gate) * up` of the two halves of `x @ weight.T + bias`, gate first. [rows, N / 2]"""
        ...

    def rope_kv(self, qkv: T, layer: int, q_norm: Vector | None, k_norm: Vector | None) -> None:
        """Normalizes q and k per head where norms are given, rotates both in place, and stores k and v
        in the layer's cache. `qkv`: [tokens, (Hq + 2 Hk) D]"""
        ...

    def attention(self, qkv: T, layer: int, window: int) -> T:
        """Causal attention over each token's own sequence, of which it sees the `window` newest
        positions (0: all). [tokens, Hq D]"""
        ...

    def select(self, x: T) -> T:
        """The rows that are sampled from. [samples, H]"""
        ...

    def all_reduce(self, x: T) -> T:
        """The sum over all ranks, on every rank; in place."""
        ...

    def head(self, x: T, weight: Linear, width: int, first: int) -> T:
        """The logits of all ranks, `width` columns, of which this rank computes those from `first` on. A
        backend may keep less of rows of which a step needs less. [samples, width]"""
        ...
