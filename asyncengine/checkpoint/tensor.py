"""What every checkpoint format gives: named tensors as read-only views of a mapped file."""

import mmap
import os
import stat
from collections.abc import Collection
from typing import NamedTuple, NoReturn, Protocol

from ..errors import ModelLoadError

__all__ = ["Checkpoint", "Coding", "MappedFile", "TensorView"]

_LFS_POINTER = b"version https://git-lfs"


class Coding(NamedTuple):
    """What stands beside the codes of a weight [N, K]: w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g].

    How words of 32 bits hold codes and zero points differs by `layout`; `_fast.cpu.Codes` draws them.
    """

    layout: str
    """awq, gptq or compressed-tensors."""
    bits: int
    group: int
    """Columns that share a scale: g = k // group."""
    scale_dtype: str
    """F16, BF16 or F32."""
    scales: memoryview
    zeros: memoryview | None
    """None: 2**(bits - 1) everywhere."""
    zero_shift: int
    """Stored zero points are smaller by this, modulo 2**bits."""
    group_index: memoryview | None
    """g for every column as int32, where groups are not runs of columns."""


class TensorView(NamedTuple):
    """One tensor as it is stored; nothing is converted."""

    name: str
    dtype: str
    """F32, F16, BF16 or F64; a GGUF block type such as Q8_0, Q4_1 or Q6_K; or CODES, with a `coding`."""
    shape: tuple[int, ...]
    """In elements and in Hugging Face order, so a linear layer is (out, in)."""
    data: memoryview
    """Read-only little-endian bytes, row after row. Rows of block types are whole blocks."""
    coding: Coding | None = None


class Checkpoint(Protocol):
    """The weights of one model under their Hugging Face names."""

    @property
    def total_bytes(self) -> int:
        """Stored size of all tensors together."""

    def names(self) -> Collection[str]:
        """Names such as `model.layers.0.self_attn.q_proj.weight`, in the order of the files."""

    def tensor(self, name: str) -> TensorView:
        """One tensor. Raises `ModelLoadError` where it is missing or of a type that is not supported."""

    def close(self) -> None:
        """Lets go of the files. Views that are still held stay valid."""


class MappedFile:
    """A file mapped read-only. `fail` raises `ModelLoadError` with its path in front."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    self.fail("is not a regular file")
                if status.st_size == 0:
                    self.fail("is empty; download it again")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelLoadError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.size = len(self.data)
        self.view = memoryview(self.data)
        if self.data[: len(_LFS_POINTER)] == _LFS_POINTER:
            self.close()
            self.fail("is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory")

    def fail(self, message: str) -> NoReturn:
        raise ModelLoadError(f"{self.path} {message}")

    def close(self) -> None:
        self.view.release()
        try:
            self.data.close()
        except BufferError:
            pass  # A tensor view is still held: the mapping goes with the last of them.
