"""Compact weights in the CPU's store: packed piece by piece, put again to the same places."""

import numpy as np
import pytest

from asyncengine._fast import cpu
from asyncengine.checkpoint.tensor import TensorView
from asyncengine.errors import ModelLoadError
from asyncengine.worker.load import DummyCheckpoint
from asyncengine.worker.models.parameters import Linear, Source
from asyncengine.worker.ops import cpu_weights
from asyncengine.worker.ops.cpu_weights import CpuWeights
from asyncengine.worker.ops.weight_format import COMPACT_LEVELS

LEVELS = [level for level in cpu.levels() if level in COMPACT_LEVELS]
STEP_ARRAYS = ("token_ids", "positions", "token_row", "query_start", "context_len", "row_slot", "sample_rows")
K = 132
PARAMETERS = [
    # Rows of two sources meet in a panel; of the second one a rank takes some.
    Linear((Source("q", (70, K), range(70)), Source("k", (90, K), range(20, 73)))),
    Linear((Source("gate", (100, K), range(100)), Source("up", (100, K), range(100))), is_gated=True),
    Linear((Source("down", (64, 2 * K), range(64), range(K, 2 * K)),), (Source("bias", (64,), range(64)),)),
]


def tensors(seed: int, deviation: float = 0.02) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sources = [source for p in PARAMETERS for source in (*p.sources, *p.biases)]
    return {s.name: rng.normal(0, deviation, s.shape).astype(np.float32) for s in sources}


class Store(CpuWeights):
    def __init__(self, level: str) -> None:
        # Of a checkpoint it looks only at how weights are stored, and not in bfloat16.
        super().__init__(cpu.Team(2, level), PARAMETERS, DummyCheckpoint, "bfloat16", None)

    def take(self, values: dict[str, np.ndarray]) -> None:
        views = {n: TensorView(n, "F32", v.shape, memoryview(v).cast("B")) for n, v in values.items()}
        for parameter in PARAMETERS:
            self.put(parameter, views.__getitem__)
        self.finish()

    def linear(self, parameter: Linear, x: np.ndarray) -> np.ndarray:
        """Of a gated pair, both products, as they lie: 32 columns of each in turn."""
        packed, rows = self.packed(parameter), parameter.out_features
        if parameter.is_gated:
            rows = 2 * (-(-rows // 2 // cpu.PANEL) * cpu.PANEL)
        out = np.zeros((len(x), rows), np.float32)
        step = cpu.Step(
            block_table=np.zeros((1, 1), np.int32),
            **dict.fromkeys(STEP_ARRAYS, np.zeros(len(x) + 1, np.int32)),
        )
        step.set_counts(len(x), 0, 0)
        program = cpu.Program(self._team)
        addresses = [out.ctypes.data, x.ctypes.data, packed.address, packed.bias]
        program.add(cpu.LINEAR, cpu.TOKENS, addresses, [rows, K, cpu.BF16, 0, packed.format.group])
        program.run(step)
        return out


def rounded(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def expected(values: dict[str, np.ndarray], parameter: Linear, x: np.ndarray) -> np.ndarray:
    parts = [rounded(values[s.name])[s.rows.start : s.rows.stop] for s in parameter.sources]
    if parameter.is_gated:
        padded = np.zeros((2, 128, K), np.float32)
        padded[:, :100] = parts
        weight = padded.reshape(2, 4, cpu.PANEL, K).swapaxes(0, 1).reshape(-1, K)
    else:
        columns = parameter.sources[0].columns or range(K)
        weight = np.concatenate(parts)[:, columns.start : columns.stop]
    bias = values["bias"] if parameter.biases else np.float32(0)
    return rounded(x).astype(np.float64) @ weight.astype(np.float64).T + bias


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("staged", [1, 3 * 32 * K * 2, 1 << 20])
def test_products(level: str, staged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_weights, "_STAGED_BYTES", staged)
    store, values = Store(level), tensors(1)
    store.take(values)
    assert 0.75 < store.nbytes / (sum(p.out_features for p in PARAMETERS) * K * 2) < 1.1  # padding too
    x = rounded(np.random.default_rng(2).standard_normal((5, K), np.float32))
    for parameter in PARAMETERS:
        out = store.linear(parameter, x)
        np.testing.assert_allclose(out, expected(values, parameter, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_weights_are_put_again(level: str) -> None:
    store, values = Store(level), tensors(1)
    store.take(values)
    places, used = [store.packed(p) for p in PARAMETERS], store.nbytes
    assert used <= store._memory.nbytes
    store.discard()
    store.take(values)
    assert ([store.packed(p) for p in PARAMETERS], store.nbytes) == (places, used)
    x = np.ones((1, K), np.float32)
    np.testing.assert_allclose(
        store.linear(PARAMETERS[1], x), expected(values, PARAMETERS[1], x), rtol=1e-5, atol=1e-5
    )
    store.discard()
    other = values | {"q": np.float32(2.0) ** np.random.default_rng(3).integers(-99, 99, (70, K))}
    with pytest.raises(ModelLoadError, match="have changed on disk"):
        store.take(other)
