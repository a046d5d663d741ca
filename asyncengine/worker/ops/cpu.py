"""The CPU backend of the ops: records a model's forward into a native step program.

While the model runs once over these ops, nothing is computed: tensors are handles of buffers, and every
call appends an operation (`_fast/cpu/cpu.h` draws their fields). A step replays the list.

Quantized linears read quantized rows, and those of bfloat16 rounded rows where the processor multiplies
such. The operation that makes a tensor writes them too, into a second buffer of the handle; where nobody
reads the float32 values, these are not written at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from asyncengine._fast import cpu
from asyncengine._fast.cpu import ROUNDED, head_bytes, quantized_row_bytes, rotation_norm

from ...checkpoint.spec import KVDType, ModelSpec
from ..models.parameters import Embedding, Linear, Vector
from .weight_format import WeightFormat

__all__ = ["KV_TYPES", "Operation", "Packed", "Placement", "Recorder", "StepMemory", "Weights"]

_TYPES = {name: getattr(cpu, name) for name in ("F32", "BF16", "F16", "Q16", "Q8", "Q4", "I8")}
"""enum ae_dtype"""
KV_TYPES: dict[KVDType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}

_ALIGNMENT = 64
_MOST_GROUP = 128
"""Columns of the widest group; a gated linear is cut between such."""


class Code(IntEnum):
    """enum ae_code"""

    EMBED = cpu.EMBED
    RMS_NORM = cpu.RMS_NORM
    LINEAR = cpu.LINEAR
    ROPE_KV = cpu.ROPE_KV
    ATTENTION = cpu.ATTENTION
    SELECT = cpu.SELECT
    ALL_REDUCE = cpu.ALL_REDUCE
    ALL_GATHER = cpu.ALL_GATHER
    QUANTIZE = cpu.QUANTIZE
    HEAD = cpu.HEAD


class Mode(IntEnum):
    """enum ae_mode"""

    STORE = 0
    ADD = 1
    GATED = 2


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


class Packed(NamedTuple):
    """Where a loaded table or linear is, and in what form."""

    address: int
    format: WeightFormat
    bias: int = 0
    """Address of the bias; 0 where this rank adds none."""
    is_panels: bool = True
    """Whether it lies in panels, as linears do, or in plain rows."""


class Weights(Protocol):
    """Where the loaded parameters are."""

    group: int
    """Group size of the quantized rows that linears read, or ROUNDED; 0 where all read float32."""

    def vector(self, parameter: Vector) -> int:
        """Address of its float32 values."""
        ...

    def packed(self, parameter: Embedding | Linear) -> Packed: ...


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


@dataclass
class _Use:
    """Which operation writes a tensor, and whether anything reads its float32 values."""

    operation: int
    is_read: bool = False


class Handle:
    """An activation [rows, width] whose memory is free again when its last reference goes."""

    __slots__ = ("_buffers", "_memory", "address", "bias", "row8", "rows", "use", "width")

    def __init__(self, memory: StepMemory, rows: Rows, width: int, nbytes: int, row8_bytes: int) -> None:
        self._memory = memory
        self._buffers = [memory.take(nbytes)]
        self.rows = rows
        self.width = width
        self.address = self._buffers[0][1]
        """Of the float32 values."""
        self.row8 = 0
        """Address of the quantized rows; 0 where there are none."""
        self.bias = 0
        """Address of what a linear has added to every row; 0 where it has no bias."""
        self.use = _Use(-1)
        if row8_bytes:
            self.take_row8(row8_bytes)

    def take_row8(self, nbytes: int) -> None:
        self._buffers.append(self._memory.take(nbytes))
        self.row8 = self._buffers[-1][1]

    def __del__(self) -> None:
        for buffer in self._buffers:
            self._memory.give(buffer)


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
    mean_rope: int
    """Its mean over all positions, float32 [head_dim], for an int8 cache."""
    block_size: int
    kv_dtype: KVDType
    kv_addresses: Callable[[int], tuple[int, int]]
    """Keys and values of a layer in block 0."""
    kv_stride: int
    """Bytes from one block to the next."""
    comm: int
    """The ranks' shared memory; 0 where this rank is the only one."""
    rank: int
    workspace_bytes: int
    """Scratch of the attention."""
    num_threads: int


class Recorder:
    """`Ops[Handle]`: what a model's forward leaves in `operations` is its step program."""

    def __init__(self, place: Placement, memory: StepMemory) -> None:
        self.operations: list[Operation] = []
        self._place = place
        self._memory = memory
        self._workspace = memory.take(place.workspace_bytes)[1]
        self._uses: list[_Use] = []
        self.best = 0
        """Where the head leaves the best of the rows that it does not store; 0: it stores all."""

    def finish(self, result: Handle) -> None:
        """Ends the recording; `result` is what the caller reads. Drops the float32 values nobody reads."""
        result.use.is_read = True
        for use in self._uses:
            operation = self.operations[use.operation]
            if not use.is_read and len(operation.p) > 4 and operation.p[4]:
                self.operations[use.operation] = operation._replace(p=(0, *operation.p[1:]))

    def embed(self, table: Embedding) -> Handle:
        packed, held = self._place.weights.packed(table), table.source.rows
        out = self._new(Rows.TOKENS, table.width)
        dtype, group, minimum = packed.format
        sizes = (table.width, _TYPES[dtype], held.start, len(held), packed.is_panels, group, minimum)
        self._add(Code.EMBED, out, (packed.address,), sizes)
        return out

    def rms_norm(self, x: Handle, weight: Vector) -> Handle:
        out = self._new(x.rows, x.width, self._place.weights.group)
        addresses = (self._read(x), self._place.weights.vector(weight), 0, out.row8)
        sizes = (x.width, 0, 0, self._place.weights.group)
        self._add(Code.RMS_NORM, out, addresses, sizes, (self._place.spec.norm_eps,))
        return out

    def linear(self, x: Handle, weight: Linear) -> Handle:
        out = self._new(x.rows, weight.out_features)
        self._linear(out, x, weight, Mode.STORE)
        out.bias = self._place.weights.packed(weight).bias
        return out

    def add_linear(self, residual: Handle, x: Handle, weight: Linear) -> None:
        # The ranks' sum holds the residual once: from rank 0.
        self._linear(residual, x, weight, Mode.ADD if self._place.rank == 0 else Mode.STORE)
        self.all_reduce(residual)

    def gated_linear(self, x: Handle, weight: Linear) -> Handle:
        out = self._new(x.rows, weight.out_features // 2, self._part_group(_MOST_GROUP))
        self._linear(out, x, weight, Mode.GATED)
        return out

    def rope_kv(self, qkv: Handle, layer: int, q_norm: Vector | None, k_norm: Vector | None) -> None:
        place = self._place
        norms = (0 if norm is None else place.weights.vector(norm) for norm in (q_norm, k_norm))
        addresses = (place.rope, *place.kv_addresses(layer), *norms, qkv.bias, place.mean_rope)
        head_dim = place.spec.head_dim
        kv_type = _TYPES[KV_TYPES[place.kv_dtype]]
        sizes = (*place.heads, head_dim, head_dim, place.block_size, kv_type, 0, 0, place.kv_stride)
        self._add(Code.ROPE_KV, qkv, addresses, sizes, (place.spec.norm_eps,))

    def attention(self, qkv: Handle, layer: int, window: int) -> Handle:
        place = self._place
        head_dim = place.spec.head_dim
        group = self._part_group(head_dim)
        out = self._new(qkv.rows, place.heads[0] * head_dim, group)
        addresses = (self._read(qkv), *place.kv_addresses(layer), out.row8, 0, 0, self._workspace)
        kv_type = _TYPES[KV_TYPES[place.kv_dtype]]
        sizes = (
            *(*place.heads, head_dim, group, place.block_size, kv_type, window),
            *(place.workspace_bytes, place.kv_stride),
        )
        scale = head_dim**-0.5
        if place.kv_dtype == "int8":  # queries and keys are rotated there
            scale /= rotation_norm(head_dim)
        self._add(Code.ATTENTION, out, addresses, sizes, (scale,))
        return out

    def select(self, x: Handle) -> Handle:
        out = self._new(Rows.SAMPLES, x.width)
        self._add(Code.SELECT, out, (self._read(x),), (x.width,))
        return out

    def all_reduce(self, x: Handle) -> Handle:
        if self._place.comm:
            self._add(Code.ALL_REDUCE, x, (self._place.comm,), (x.width,))
        return x

    def head(self, x: Handle, weight: Linear, width: int, first: int) -> Handle:
        if self._place.comm:  # other ranks have the rest of each row
            part = self.linear(x, weight)
            out = self._new(x.rows, width)
            self._add(Code.ALL_GATHER, out, (self._read(part), self._place.comm), (part.width, width, first))
            return out
        out = self._new(x.rows, width)
        self.best = self._memory.take(head_bytes(self._place.num_threads, self._place.max_samples))[1]
        self._linear(out, x, weight, Mode.STORE, Code.HEAD, self.best)
        return out

    def _linear(
        self,
        out: Handle,
        x: Handle,
        weight: Linear,
        mode: Mode,
        code: Code = Code.LINEAR,
        p4: int = 0,
    ) -> None:
        packed = self._place.weights.packed(weight)
        dtype, group, minimum = packed.format
        rounded = self._place.weights.group == ROUNDED
        rows = ROUNDED if rounded else packed.format.rows
        source = self._quantized(x, rows) if rows else self._read(x)
        if mode is Mode.GATED:
            p4 = out.row8
        sizes = (
            *(weight.out_features, weight.in_features, _TYPES[dtype], self._place.weights.group),
            *(group, minimum, mode, rounded),
        )
        self._add(code, out, (source, packed.address, packed.bias, p4), sizes)

    def _part_group(self, width: int) -> int:
        """Group size with which a thread can quantize its part of a row, a multiple of `width`; 0 if it
        cannot, and the row is quantized when all of it is there."""
        group = self._place.weights.group
        return group if group == ROUNDED or (group > 0 and width % group == 0) else 0

    def _quantized(self, x: Handle, group: int) -> int:
        """Address of the quantized rows of `x`, made here if its own operation did not."""
        if not x.row8:
            x.take_row8(self._row8_bytes(x.rows, x.width, group))
            self.operations.append(
                Operation(Code.QUANTIZE, x.rows, (0, self._read(x), 0, 0, x.row8), (x.width, 0, 0, group))
            )
        return x.row8

    def _read(self, x: Handle) -> int:
        x.use.is_read = True
        return x.address

    def _most(self, rows: Rows) -> int:
        return self._place.max_tokens if rows is Rows.TOKENS else self._place.max_samples

    def _row8_bytes(self, rows: Rows, width: int, group: int) -> int:
        return self._most(rows) * quantized_row_bytes(width, group) if group else 0

    def _new(self, rows: Rows, width: int, group: int = 0) -> Handle:
        """A tensor; with `group`, one whose operation writes quantized rows too."""
        nbytes = 4 * self._most(rows) * width
        return Handle(self._memory, rows, width, nbytes, self._row8_bytes(rows, width, group))

    def _add(
        self,
        code: Code,
        first: Handle,
        addresses: tuple[int, ...],
        sizes: tuple[int, ...],
        scalars: tuple[float, ...] = (),
    ) -> None:
        """`first` is the operation's p0 and sets its rows."""
        if first.use.operation < 0:
            first.use.operation = len(self.operations)
            self._uses.append(first.use)
        self.operations.append(Operation(code, first.rows, (first.address, *addresses), sizes, scalars))
