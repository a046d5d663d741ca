"""From a model's files to its description."""

from collections.abc import Mapping
from typing import Any

from .config import apply_overrides, load_config, spec_from_config
from .generation import generation_eos_ids, with_eos_ids
from .gguf import GGUFFile
from .gguf_spec import spec_from_gguf
from .hub import ModelFiles
from .spec import ModelSpec

__all__ = ["load_spec"]


def load_spec(files: ModelFiles, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model in `files`, with `hf_overrides` applied and all ends of text known.

    Reads headers and JSON only. Raises `ModelLoadError` where they are damaged or ask for something that
    is not supported.
    """
    if files.gguf_path is not None:
        gguf = GGUFFile(files.gguf_path, arrays=False)
        try:
            return spec_from_gguf(gguf, overrides)
        finally:
            gguf.close()
    spec = spec_from_config(apply_overrides(load_config(files.directory), overrides))
    return with_eos_ids(spec, generation_eos_ids(files.directory))
