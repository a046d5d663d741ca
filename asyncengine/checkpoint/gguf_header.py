"""The header of a GGUF file: metadata, and where each tensor lies.

Versions 2 and 3, little-endian, as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every
count and length in the file is checked against the bytes that are left before anything is made of it.
"""

import itertools
import math
import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .tensor import MappedFile

__all__ = ["SUPPORTED", "TensorInfo", "read_header"]

MAX_METADATA_BYTES = 128 << 20
MAX_ARRAY_ITEMS = 1 << 24
MAX_DIMS = 4
SHORT_ARRAY = 4096
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}

# Type number: name, elements per block, bytes per block (ggml's type traits).
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
SUPPORTED = frozenset(("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"))
"""Types whose tensors can be loaded; the others can be listed."""


class TensorInfo(NamedTuple):
    """A tensor as the header has it."""

    file: MappedFile
    gguf_name: str
    dtype: str
    shape: tuple[int, ...]
    """In Hugging Face order: GGUF's own is the reverse."""
    begin: int
    """Bytes from the file's start, as is `end`."""
    end: int


def read_header(file: MappedFile, *, arrays: bool) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata by key, with arrays as lists, and all tensors in the file's order.

    `arrays=False` leaves out arrays of more than `SHORT_ARRAY` items.

    Raises `ModelLoadError` where the file is not GGUF, damaged or cut short.
    """
    if file.data[:4] != b"GGUF":
        file.fail("is not a GGUF file")
    reader = _Reader(file)
    version = reader.u32()
    if version & 0xFFFF == 0:
        file.fail("is a big-endian GGUF file; only little-endian ones are read")
    if version not in (2, 3):
        file.fail(f"has GGUF version {version}; versions 2 and 3 are read, so convert the model again")
    num_tensors = reader.count(32)
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(13)):
        key = reader.string()
        if key in metadata:
            file.fail(f"is damaged: it has metadata {key!r} twice")
        metadata[key] = reader.value(reader.u32(), arrays)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    raw = [_read_tensor(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment not in (1 << n for n in range(21)):
        file.fail(f"is damaged: general.alignment is {alignment!r}, not a power of two")
    start = -(-reader.position // alignment) * alignment
    tensors = [_place(file, *fields, start, alignment) for fields in raw]
    for tensor, after in itertools.pairwise(sorted(tensors, key=lambda tensor: tensor.begin)):
        if after.begin < tensor.end:
            file.fail(f"is damaged: tensors {tensor.gguf_name!r} and {after.gguf_name!r} overlap")
    return metadata, tensors


def _read_tensor(reader: "_Reader") -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type number, and offset in the data section."""
    name = reader.string()
    num_dims = reader.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        reader.file.fail(f"is damaged: tensor {name!r} has {num_dims} dimensions")
    shape = tuple(reader.u64() for _ in range(num_dims))[::-1]
    if 0 in shape:
        reader.file.fail(f"is damaged: tensor {name!r} is empty")
    return name, shape, reader.u32(), reader.u64()


def _place(
    file: MappedFile, name: str, shape: tuple[int, ...], code: int, offset: int, start: int, alignment: int
) -> TensorInfo:
    if code not in _TYPES:
        file.fail(
            f"holds tensor {name!r} of the unknown type {code}; supported: {', '.join(sorted(SUPPORTED))}"
        )
    dtype, per_block, block_bytes = _TYPES[code]
    if shape[-1] % per_block:
        file.fail(f"is damaged: {name!r} has rows of {shape[-1]} elements, not whole {dtype} blocks")
    if offset % alignment:
        file.fail(f"is damaged: {name!r} does not start at a multiple of {alignment} bytes")
    begin = start + offset
    end = begin + math.prod(shape) // per_block * block_bytes
    if end > file.size:
        file.fail(f"is cut short: it has {file.size} bytes, and {name!r} ends at {end}; download it again")
    return TensorInfo(file, name, dtype, shape, begin, end)


class _Reader:
    """Walks over the metadata; nothing at or after `limit` is looked at."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.data = file.data
        self.position = 4
        self.limit = min(file.size, MAX_METADATA_BYTES)
        self.items_left = MAX_ARRAY_ITEMS

    def cut_short(self) -> NoReturn:
        if self.limit < self.file.size:
            self.file.fail(f"has metadata of more than {MAX_METADATA_BYTES} bytes, or is damaged")
        self.file.fail("is cut short inside its metadata, or is damaged; download it again")

    def scalar(self, form: struct.Struct) -> Any:
        if self.limit - self.position < form.size:
            self.cut_short()
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def u32(self) -> int:
        return int(self.scalar(_U32))

    def u64(self) -> int:
        return int(self.scalar(_U64))

    def count(self, item_bytes: int) -> int:
        """A number of items that take at least `item_bytes` each."""
        count = self.u64()
        if count > (self.limit - self.position) // item_bytes:
            self.cut_short()
        return count

    def string(self) -> str:
        length = self.count(1)
        start = self.position
        self.position += length
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            self.file.fail(f"is damaged: a string in its metadata is not UTF-8 ({error})")

    def value(self, code: int, arrays: bool) -> Any:
        if code in _SCALARS:
            return self.scalar(_SCALARS[code])
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            return self.array(arrays)
        self.file.fail(f"is damaged: it has metadata of the unknown type {code}")

    def array(self, arrays: bool) -> list[Any] | None:
        code = self.u32()
        form = _SCALARS.get(code)
        if form is None and code != _STRING:
            self.file.fail(f"has a metadata array with items of type {code}; numbers and strings are read")
        count = self.count(form.size if form is not None else 8)
        self.items_left -= count
        if self.items_left < 0:
            self.file.fail(f"has metadata arrays of more than {MAX_ARRAY_ITEMS} items together")
        wanted = arrays or count <= SHORT_ARRAY
        if form is None:
            return self.strings(count, wanted)
        start = self.position
        self.position += count * form.size
        if not wanted:
            return None
        items: list[Any] = np.frombuffer(self.data[start : self.position], form.format).tolist()
        return items

    def strings(self, count: int, wanted: bool) -> list[str] | None:
        # The one hot loop: a vocabulary and its merges are some hundred thousand strings.
        data, limit, position, unpack = self.data, self.limit, self.position, _U64.unpack_from
        result: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > limit:
                    self.cut_short()
                if wanted:
                    result.append(data[start:position].decode())
        except struct.error:
            self.cut_short()
        except UnicodeDecodeError as error:
            self.file.fail(f"is damaged: a string in its metadata is not UTF-8 ({error})")
        self.position = position
        return result if wanted else None
