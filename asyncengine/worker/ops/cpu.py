"""The CPU backend of the ops: records a model's forward into a native step program.

While the model runs once over these ops, nothing is computed: tensors are handles of buffers, and every
call appends an operation (`_fast/cpu/cpu.h` draws their fields). A step replays the list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from ...checkpoint.spec import DType, ModelSpec
from ..models.parameters import Embedding, Linear, Vector

__all__ = ["Operation", "Placement", "Recorder", "StepMemory", "Weights"]

DTYPE_CODES: dict[DType, int] = {"float32": 0, "bfloat16": 1, "float16": 2}
"""enum ae_dtype"""

_ALIGNMENT = 64


class Code(IntEnum):
    """enum ae_code"""

    EMBED = 0
    RMS_NORM = 1
    ADD_RMS_NORM = 2
    LINEAR = 3
    ROPE_KV = 4
    ATTENTION = 5
    SILU_MUL = 6
    SELECT = 7
    ALL_REDUCE = 8
    ALL_GATHER = 9


class Rows(IntEnum):
    """enum ae_rows"""

    TOKENS = 0
    SAMPLES = 1


class Operation(NamedTuple):
    """One entry of a step program: addresses, sizes and scalars as in `ae_op`."""

    code: Code
    rows: Rows
    p: tuple[int, ...]
    n: tuple[int, ...]
    f: tuple[float, ...] = ()


class Weights(Protocol):
    """Where the loaded parameters are."""

    dtype: DType

    def address(self, parameter: Embedding | Linear | Vector) -> int:
        """Of the table, the packed weight or the vector."""
        ...

    def bias(self, parameter: Linear) -> int:
        """Of the bias, 0 where this rank adds none."""
        ...


class StepMemory:
    """Addresses of the activations: a buffer is taken again once the handle on it is gone."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._free: list[tuple[int, int]] = []
        self.size = 0

    def take(self, nbytes: int) -> tuple[int, int]:
        """(size, address) of the smallest free buffer that is large enough, else of a new one."""
        fitting = [buffer for buffer in self._free if buffer[0] >= nbytes]
        if fitting:
            best = min(fitting)
            self._free.remove(best)
            return best
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = (size, self._base + self.size)
        self.size += size
        return buffer

    def give(self, buffer: tuple[int, int]) -> None:
        self._free.append(buffer)


class Handle:
    """A float32 activation [rows, width] whose memory is free again when its last reference goes."""

    __slots__ = ("_buffer", "_memory", "rows", "width")

    def __init__(self, memory: StepMemory, rows: Rows, nbytes: int, width: int) -> None:
        self._memory = memory
        self._buffer = memory.take(nbytes)
        self.rows = rows
        self.width = width

    @property
    def address(self) -> int:
        return self._buffer[1]

    def __del__(self) -> None:
        self._memory.give(self._buffer)


@dataclass(frozen=True)
class Placement:
    """Sizes and addresses that a recording needs. Addresses of 0 make a recording that only counts."""

    spec: ModelSpec
    heads: tuple[int, int]
    """Query and KV heads of this rank."""
    max_tokens: int
    max_samples: int
    weights: Weights
    rope: int
    """float32 [positions, head_dim], see `rope.cos_sin_table`."""
    block_size: int
    kv_dtype: DType
    kv_addresses: Callable[[int], tuple[int, int]]
    """Keys and values of a layer."""
    comm: int
    """The ranks' shared memory; 0 where this rank is the only one."""
    workspace_bytes: int
    """Scratch of the attention."""


class Recorder:
    """`Ops[Handle]`: what a model's forward leaves in `operations` is its step program."""

    def __init__(self, place: Placement, memory: StepMemory) -> None:
        self.operations: list[Operation] = []
        self._place = place
        self._memory = memory
        self._workspace = memory.take(place.workspace_bytes)[1]

    def embed(self, table: Embedding) -> Handle:
        weights, held = self._place.weights, table.source.rows
        out = self._new(Rows.TOKENS, table.width)
        sizes = (table.width, DTYPE_CODES[weights.dtype], held.start, len(held))
        self._add(Code.EMBED, out, (weights.address(table),), sizes)
        return out

    def rms_norm(self, x: Handle, weight: Vector) -> Handle:
        out = self._new(x.rows, x.width)
        addresses = (x.address, self._place.weights.address(weight))
        self._add(Code.RMS_NORM, out, addresses, (x.width,), (self._place.spec.norm_eps,))
        return out

    def add_rms_norm(self, residual: Handle, x: Handle, weight: Vector) -> Handle:
        out = self._new(x.rows, x.width)
        addresses = (residual.address, x.address, self._place.weights.address(weight))
        self._add(Code.ADD_RMS_NORM, out, addresses, (x.width,), (self._place.spec.norm_eps,))
        return out

    def linear(self, x: Handle, weight: Linear) -> Handle:
        weights = self._place.weights
        out = self._new(x.rows, weight.out_features)
        addresses = (x.address, weights.address(weight), weights.bias(weight))
        sizes = (weight.out_features, weight.in_features, DTYPE_CODES[weights.dtype])
        self._add(Code.LINEAR, out, addresses, sizes)
        return out

    def rope_kv(self, qkv: Handle, layer: int, q_norm: Vector | None, k_norm: Vector | None) -> None:
        place = self._place
        norms = (0 if norm is None else place.weights.address(norm) for norm in (q_norm, k_norm))
        addresses = (place.rope, *place.kv_addresses(layer), *norms)
        head_dim = place.spec.head_dim
        sizes = (*place.heads, head_dim, head_dim, place.block_size, DTYPE_CODES[place.kv_dtype])
        self._add(Code.ROPE_KV, qkv, addresses, sizes, (place.spec.norm_eps,))

    def attention(self, qkv: Handle, layer: int, window: int) -> Handle:
        place = self._place
        head_dim = place.spec.head_dim
        out = self._new(qkv.rows, place.heads[0] * head_dim)
        addresses = (qkv.address, *place.kv_addresses(layer), 0, 0, 0, self._workspace)
        sizes = (*place.heads, head_dim, 0, place.block_size, DTYPE_CODES[place.kv_dtype], window)
        self._add(Code.ATTENTION, out, addresses, (*sizes, place.workspace_bytes), (head_dim**-0.5,))
        return out

    def silu_mul(self, gate_up: Handle) -> Handle:
        out = self._new(gate_up.rows, gate_up.width // 2)
        self._add(Code.SILU_MUL, out, (gate_up.address,), (out.width,))
        return out

    def select(self, x: Handle) -> Handle:
        out = self._new(Rows.SAMPLES, x.width)
        self._add(Code.SELECT, out, (x.address,), (x.width,))
        return out

    def all_reduce(self, x: Handle) -> Handle:
        if self._place.comm:
            self._add(Code.ALL_REDUCE, x, (self._place.comm,), (x.width,))
        return x

    def all_gather(self, x: Handle, width: int, first: int) -> Handle:
        if not self._place.comm:
            return x
        out = self._new(x.rows, width)
        self._add(Code.ALL_GATHER, out, (x.address, self._place.comm), (x.width, width, first))
        return out

    def _new(self, rows: Rows, width: int) -> Handle:
        place = self._place
        most = place.max_tokens if rows is Rows.TOKENS else place.max_samples
        return Handle(self._memory, rows, 4 * most * width, width)

    def _add(
        self,
        code: Code,
        first: Handle,
        addresses: tuple[int, ...],
        sizes: tuple[int, ...],
        scalars: tuple[float, ...] = (),
    ) -> None:
        """`first` is the operation's p0 and sets its rows."""
        self.operations.append(Operation(code, first.rows, (first.address, *addresses), sizes, scalars))
