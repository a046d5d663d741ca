"""Safetensors: one file, several files, or shards under an index, read through mmap.

A file is a little-endian 64-bit header length, that much JSON, then the tensors' bytes without a gap
(https://github.com/huggingface/safetensors#format). The header decides what memory is looked at, so
all of it is checked against the file's size before any tensor is handed out.
"""

import math
import os
from collections.abc import Collection
from typing import Annotated, NamedTuple

import msgspec

from ..errors import ModelLoadError
from .tensor import MappedFile, TensorView

__all__ = ["INDEX_NAME", "SINGLE_NAME", "SafetensorsCheckpoint", "open_safetensors"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16

SUPPORTED = frozenset(("F64", "F32", "F16", "BF16"))
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct):
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Annotated[list[_Size], msgspec.Meta(max_length=MAX_RANK)]
    data_offsets: tuple[_Size, _Size]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_header_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry_decoder = msgspec.json.Decoder(_Entry)
_index_decoder = msgspec.json.Decoder(_Index)


class _Stored(NamedTuple):
    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsCheckpoint:
    """Tensors of one or more safetensors files. See `open_safetensors`."""

    def __init__(self, paths: Collection[str]) -> None:
        self._files: list[MappedFile] = []
        self._tensors: dict[str, _Stored] = {}
        try:
            for path in paths:
                file = MappedFile(path)
                self._files.append(file)
                for name, stored in _read_header(file).items():
                    if name in self._tensors:
                        file.fail(f"holds tensor {name!r}, and so does {self._tensors[name].file.path}")
                    self._tensors[name] = stored
        except BaseException:
            self.close()
            raise

    @property
    def total_bytes(self) -> int:
        return sum(stored.end - stored.begin for stored in self._tensors.values())

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def tensor(self, name: str, dtypes: Collection[str] = SUPPORTED) -> TensorView:
        """One tensor, of one of `dtypes`; no other type is given out."""
        stored = self._tensors.get(name)
        if stored is None:
            raise ModelLoadError(f"{self.path} holds no tensor {name!r}")
        if stored.dtype not in dtypes:
            stored.file.fail(
                f"holds tensor {name!r} of type {stored.dtype}, which is not supported; "
                f"supported: {', '.join(sorted(dtypes))}"
            )
        return TensorView(name, stored.dtype, stored.shape, stored.file.view[stored.begin : stored.end])

    @property
    def path(self) -> str:
        """The file, or the directory of several."""
        return self._files[0].path if len(self._files) == 1 else os.path.dirname(self._files[0].path)

    def file_of(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        return self._tensors[name].file.path

    def close(self) -> None:
        self._tensors = {}
        for file in self._files:
            file.close()
        self._files = []


def open_safetensors(directory: str | os.PathLike[str]) -> SafetensorsCheckpoint:
    """Opens the safetensors of a model directory, or one `.safetensors` file.

    In a directory: the shards that `model.safetensors.index.json` names, else `model.safetensors`, else
    every `*.safetensors`. Raises `ModelLoadError` naming the file that is missing, damaged or cut short.
    """
    root = os.fspath(directory)
    if os.path.isfile(root):
        return SafetensorsCheckpoint([root])
    index_path = os.path.join(root, INDEX_NAME)
    if os.path.isfile(index_path):
        return _open_sharded(root, index_path)
    paths = [os.path.join(root, name) for name in weight_files(root)]
    if not paths:
        raise ModelLoadError(f"{root} holds no *.safetensors file")
    return SafetensorsCheckpoint(paths)


def weight_files(root: str) -> list[str]:
    """Names of the safetensors of a directory that has no index."""
    try:
        names = sorted(name for name in os.listdir(root) if name.endswith(".safetensors"))
    except OSError as error:
        raise ModelLoadError(f"cannot read {root}: {error.strerror or error}") from error
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    # Mistral's own naming of the same weights, shipped beside the Hugging Face files.
    return [name for name in names if not name.startswith("consolidated")] or names


def _open_sharded(root: str, index_path: str) -> SafetensorsCheckpoint:
    index = MappedFile(index_path)
    try:
        if index.size > MAX_HEADER_BYTES:
            index.fail(f"has {index.size} bytes; an index has at most {MAX_HEADER_BYTES}")
        weight_map = _index_decoder.decode(index.view).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelLoadError(f"{index_path} is damaged ({error}); download it again") from error
    finally:
        index.close()
    shards = sorted(set(weight_map.values()))
    if not shards:
        raise ModelLoadError(f"{index_path} names no tensors; download it again")
    for shard in shards:
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise ModelLoadError(f"{index_path} names {shard!r}, which is not a *.safetensors file beside it")
        if not os.path.isfile(os.path.join(root, shard)):
            raise ModelLoadError(
                f"{os.path.join(root, shard)} is missing: {INDEX_NAME} names {len(shards)} shards; "
                f"download the model again"
            )
    checkpoint = SafetensorsCheckpoint([os.path.join(root, shard) for shard in shards])
    held = checkpoint.names()
    for name, shard in weight_map.items():
        if name not in held or os.path.basename(checkpoint.file_of(name)) != shard:
            checkpoint.close()
            raise ModelLoadError(
                f"{os.path.join(root, shard)} lacks tensor {name!r}, which {INDEX_NAME} says it holds; "
                f"index and shards are of different downloads, so download the model again"
            )
    return checkpoint


def _read_header(file: MappedFile) -> dict[str, _Stored]:
    """Reads and checks one file's header; offsets in the result count from the file's start."""
    length = int.from_bytes(file.data[:8], "little")
    if file.size < 8 or length > file.size - 8:
        file.fail("is cut short inside its header, or is not a safetensors file; download it again")
    if length > MAX_HEADER_BYTES:
        file.fail(f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    start = 8 + length
    tensors: dict[str, _Stored] = {}
    try:
        for name, raw in _header_decoder.decode(file.data[8:start]).items():
            if name == "__metadata__":
                continue
            entry = _entry_decoder.decode(raw)
            begin, end = entry.data_offsets
            tensors[name] = _Stored(file, entry.dtype, tuple(entry.shape), start + begin, start + end)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        file.fail(f"has a damaged header ({error}); download it again")
    position = start
    for name, stored in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if stored.begin != position or stored.end < stored.begin:
            file.fail(f"is damaged: the bytes of tensor {name!r} overlap others or leave a gap")
        position = stored.end
        bits = _BITS.get(stored.dtype)
        if bits is not None and math.prod(stored.shape) * bits != (stored.end - stored.begin) * 8:
            file.fail(
                f"is damaged: tensor {name!r} of shape {list(stored.shape)} and type {stored.dtype} "
                f"cannot have {stored.end - stored.begin} bytes"
            )
    if position > file.size:
        file.fail(f"is cut short: {file.size} bytes, its header says {position}; download it again")
    if position < file.size:
        file.fail(f"is damaged: {file.size - position} bytes after the last tensor; download it again")
    return tensors
