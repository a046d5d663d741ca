"""From checkpoint names to the model's parameters: strict both ways, checked before anything is copied."""

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from ..checkpoint.gguf import GGUFFile
from ..checkpoint.packed import PackedCheckpoint
from ..checkpoint.safetensors import open_safetensors
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tensor import Checkpoint, TensorView
from ..errors import ModelLoadError
from ..wire.stages import WorkerConfig
from .models.decoder import Decoder
from .models.parameters import Linear, Parameter, Source

__all__ = ["DummyCheckpoint", "Store", "check_weights", "fill", "open_checkpoint", "sources_of"]

_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that old checkpoints saved beside the weights; they follow from the configuration."""

_HEAD = "lm_head.weight"
_SHOWN = 5


class Store(Protocol):
    """Where a backend keeps weights, in a form of its own."""

    def put(self, parameter: Parameter, tensor: Callable[[str], TensorView]) -> None:
        """Takes this rank's part of `parameter`; `tensor` gives its sources by name."""
        ...


def check_weights(model: Decoder, checkpoint: Checkpoint) -> dict[str, int]:
    """Stored bytes of every tensor that the model takes, by name.

    Raises ModelLoadError for missing, unexpected or wrongly shaped tensors.
    """
    sources = {source.name: source for parameter in model.parameters() for source in sources_of(parameter)}
    _check_names(set(sources), _without_zero_biases(checkpoint, model.spec, sources), model.spec)
    if _HEAD not in sources and _HEAD in checkpoint.names():
        # Some tools save a tied head too. As everywhere, the tie wins; but it must be the same matrix.
        _check_shape(checkpoint.tensor(_HEAD), model.embed.source._replace(name=_HEAD))
    return {name: _check_shape(checkpoint.tensor(name), source) for name, source in sources.items()}


def fill(
    store: Store,
    parameters: Iterable[Parameter],
    checkpoint: Checkpoint,
    sizes: dict[str, int],
    progress: Callable[[int, int], None],
) -> None:
    """Moves every parameter into `store`; `progress(done, total)` counts the checkpoint bytes `sizes`."""
    remaining = dict(sizes)
    total, done = sum(sizes.values()), 0
    for parameter in parameters:
        store.put(parameter, checkpoint.tensor)
        done += sum(remaining.pop(source.name, 0) for source in sources_of(parameter))
        progress(done, total)


def sources_of(parameter: Parameter) -> tuple[Source, ...]:
    """The checkpoint tensors that make up a parameter."""
    if isinstance(parameter, Linear):
        return parameter.sources + parameter.biases
    return (parameter.source,)


def _check_names(expected: set[str], present: Collection[str], spec: ModelSpec) -> None:
    missing = expected.difference(present)
    if missing:
        raise ModelLoadError(
            f"the checkpoint lacks {_some(missing)}, which {spec.architecture} with this configuration needs;"
            " it is incomplete, or belongs to another model"
        )
    extra = {name for name in present if name not in expected and not _HARMLESS.search(name)}
    if spec.tie_embeddings:
        extra.discard(_HEAD)
    if extra:
        raise ModelLoadError(
            f"the checkpoint has {_some(extra)}, which {spec.architecture} with this configuration does not"
            " use; its config.json belongs to another model, or the model has parts that are not supported"
        )


def _without_zero_biases(
    checkpoint: Checkpoint, spec: ModelSpec, expected: Collection[str]
) -> Collection[str]:
    """Its names. Tools have written a bias for every quantized linear, zeros where the model has none."""
    if spec.packing is None:
        return checkpoint.names()
    biases = {name for name in checkpoint.names() if name.endswith(".bias") and name not in expected}
    return [name for name in checkpoint.names() if name not in biases or any(checkpoint.tensor(name).data)]


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"


def _check_shape(view: TensorView, source: Source) -> int:
    if tuple(view.shape) != source.shape:
        raise ModelLoadError(
            f"tensor {source.name} has shape {list(view.shape)}, the configuration needs {list(source.shape)}"
        )
    return view.data.nbytes


def open_checkpoint(config: WorkerConfig, model: Decoder) -> Checkpoint:
    """The checkpoint that the configuration names."""
    if config.load_format == "dummy":
        return DummyCheckpoint(model, config.seed)
    path = Path(config.weights)
    if config.load_format == "gguf":
        return GGUFFile(path, arrays=False)
    stored, packing = open_safetensors(path), config.spec.packing
    return stored if packing is None else PackedCheckpoint(stored, packing)


class DummyCheckpoint:
    """Random weights of the right shapes, the same for any number of ranks.

    Normal with deviation 0.02, norms 1: activations keep a sensible size. All tensors are windows on one
    repeated stretch of noise, each at a place of its own, so that they cost nothing to make.
    """

    def __init__(self, model: Decoder, seed: int) -> None:
        self._sources = {s.name: s for parameter in model.parameters() for s in sources_of(parameter)}
        # A prime length: rows of no usual width repeat one another.
        noise = np.random.default_rng(seed).normal(0.0, 0.02, 1_048_573).astype(np.float16)
        self._period = len(noise)
        longest = max(math.prod(source.shape) for source in self._sources.values())
        self._noise = np.resize(noise, self._period + longest)

    @property
    def total_bytes(self) -> int:
        return sum(2 * math.prod(source.shape) for source in self._sources.values())

    def names(self) -> Collection[str]:
        return self._sources.keys()

    def tensor(self, name: str) -> TensorView:
        shape = self._sources[name].shape
        size = math.prod(shape)
        start = zlib.crc32(name.encode()) % self._period
        values = np.ones(size, np.float16) if name.endswith("norm.weight") else self._noise[start:][:size]
        return TensorView(name, "F16", shape, values.view(np.uint8).data)

    def close(self) -> None:
        """Nothing is open."""
