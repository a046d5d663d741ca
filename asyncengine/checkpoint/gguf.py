"""A GGUF model under Hugging Face names and in the Hugging Face layout."""

import os
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from ..errors import ModelLoadError
from .gguf_header import SUPPORTED, TensorInfo, read_header
from .tensor import MappedFile, TensorView

__all__ = ["GGUFFile"]

MAX_SPLITS = 4096
ROPE_FACTORS = "rope_freqs.weight"

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", re.ASCII)
_QUERY_OR_KEY = re.compile(r"blk\.\d{1,6}\.attn_([qk])\.(?:weight|bias)", re.ASCII)
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.ASCII)


class GGUFFile:
    """A GGUF model, a `Checkpoint`. Of a model in several files the path of any one will do.

    `arrays=False` leaves long arrays out of the metadata: who only loads tensors needs no vocabulary.
    Raises `ModelLoadError` for anything that is not a whole, well-formed file.

    Where the converter has interleaved the rows of query and key heads (architecture `llama`), `tensor`
    puts them back in order. Tensors without a Hugging Face counterpart keep their GGUF name, so that a
    strict loader meets them.
    """

    def __init__(self, path: str | os.PathLike[str], *, arrays: bool = True) -> None:
        self.metadata: dict[str, Any] = {}
        """Scalars as Python values, arrays as lists, by GGUF key."""
        self._files: list[MappedFile] = []
        self._tensors: dict[str, TensorInfo] = {}
        paths = _split_paths(os.fspath(path))
        self.path = paths[0]
        try:
            self.metadata = self._open(paths[0], arrays)
            count = self.metadata.get("split.count", 1)
            if max(count, 1) != len(paths):
                self._files[0].fail(
                    f"is one of {count} files, but is not named …-00001-of-{count:05d}.gguf; restore its name"
                )
            for number, part in enumerate(paths[1:], 1):
                metadata = self._open(part, False)
                if (metadata.get("split.no"), metadata.get("split.count")) != (number, count):
                    self._files[-1].fail(
                        f"is not the part that its name says; download {self.path} etc. again"
                    )
            total = self.metadata.get("split.tensors.count", len(self._tensors))
            if total != len(self._tensors):
                self._files[0].fail(
                    f"etc. hold {len(self._tensors)} tensors, not {total}; download them again"
                )
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as `llama` or `qwen2`."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise ModelLoadError(f"{self.path} does not name its architecture (general.architecture)")
        return value

    @property
    def total_bytes(self) -> int:
        return sum(info.end - info.begin for info in self._tensors.values())

    @property
    def rope_factors(self) -> tuple[float, ...] | None:
        """Divisors of the rotary frequencies, one per frequency, where the file carries them."""
        info = self._tensors.get(ROPE_FACTORS)
        if info is None:
            return None
        if info.dtype != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 16:
            info.file.fail(f"has an unusable {ROPE_FACTORS}: {info.dtype} {list(info.shape)}")
        factors = np.frombuffer(info.file.data[info.begin : info.end], "<f4")
        if not np.all(np.isfinite(factors) & (factors > 0)):
            info.file.fail(f"has an unusable {ROPE_FACTORS}: its values must be positive")
        return tuple(factors.tolist())

    def names(self) -> Collection[str]:
        """All names but `rope_freqs.weight`: that one is `rope_factors`."""
        return [name for name in self._tensors if name != ROPE_FACTORS]

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor, also of types that cannot be loaded."""
        info = self._tensors.get(name)
        if info is None:
            raise ModelLoadError(f"{self.path} holds no tensor {name!r}")
        return info

    def tensor(self, name: str) -> TensorView:
        info = self.info(name)
        if info.dtype not in SUPPORTED:
            info.file.fail(
                f"holds {info.gguf_name!r} of type {info.dtype}, which is not supported; "
                f"supported: {', '.join(sorted(SUPPORTED))}"
            )
        data = info.file.view[info.begin : info.end]
        match = _QUERY_OR_KEY.fullmatch(info.gguf_name)
        if match is not None and self.architecture == "llama":
            data = self._deinterleave(data, info, match[1])
        return TensorView(name, info.dtype, info.shape, data)

    def close(self) -> None:
        self._tensors = {}
        for file in self._files:
            file.close()
        self._files = []

    def _open(self, path: str, arrays: bool) -> dict[str, Any]:
        file = MappedFile(path)
        self._files.append(file)
        metadata, tensors = read_header(file, arrays=arrays)
        for info in tensors:
            name = _hugging_face_name(info.gguf_name)
            if name in self._tensors:
                file.fail(f"is damaged: tensor {info.gguf_name!r} is there twice")
            self._tensors[name] = info
        for key in ("split.count", "split.no", "split.tensors.count"):
            if not isinstance(metadata.get(key, 0), int):
                file.fail(f"is damaged: {key} is not an integer")
        return metadata

    def _deinterleave(self, data: memoryview, info: TensorInfo, projection: str) -> memoryview:
        # Rows 2i and 2i + 1 of a head are rows i and i + head_dim / 2 of the Hugging Face layout; a row of
        # any type is whole bytes.
        heads = self.metadata.get("llama.attention.head_count")
        if projection == "k":
            heads = self.metadata.get("llama.attention.head_count_kv", heads)
        rows = info.shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            info.file.fail(f"holds {info.gguf_name!r} with {rows} rows, which are not {heads!r} heads")
        pairs = np.frombuffer(data, np.uint8).reshape(heads, rows // heads // 2, 2, -1)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1).data.toreadonly()


def _hugging_face_name(gguf_name: str) -> str:
    match = _LAYER.fullmatch(gguf_name)
    if match is not None and match[2] in _PER_LAYER:
        return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.{match[3]}"
    return _WHOLE.get(gguf_name, gguf_name)


def _split_paths(path: str) -> list[str]:
    """The files of a model in several files, or the path alone."""
    match = _SPLIT.fullmatch(path)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= count <= MAX_SPLITS:
        raise ModelLoadError(f"{path} is named as one of {count} files; 1 to {MAX_SPLITS} are possible")
    paths = [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, count + 1)]
    for part in paths:
        if not os.path.isfile(part):
            raise ModelLoadError(f"{part} is missing: the model comes in {count} files; download all of them")
    return paths
