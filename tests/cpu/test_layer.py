"""Whole steps of a small layer: the same bits on every number of threads, from prefill to decode."""

import time

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS
from .test_head import BEST, listed

HIDDEN, Q_HEADS, KV_HEADS, DIM, INNER, VOCAB = 72, 4, 2, 32, 96, 333
QKV = (Q_HEADS + 2 * KV_HEADS) * DIM
STORE, ADD, GATED = range(3)
MOST_TOKENS, MOST_ROWS, MOST_CONTEXT, BLOCK = 300, 9, 704, 16
TABLE = MOST_CONTEXT // BLOCK
# Weights: type, group, has minimum; and what the KV cache holds beside them.
FORMATS = {
    "f32": ("F32", 0, False, "F32"),
    "bf16": ("BF16", 0, False, "BF16"),
    "f16": ("F16", 0, False, "F16"),
    "pairs": ("Q16", cpu.WHOLE16, False, "BF16"),
    "int8": ("Q8", 32, False, "I8"),
    "int8-whole": ("Q8", cpu.WHOLE, False, "BF16"),
    "int8-minimum": ("Q8", 64, True, "BF16"),
    "int4": ("Q4", 32, False, "BF16"),
    "int4-whole": ("Q4", cpu.WHOLE, False, "BF16"),
    "int4-minimum": ("Q4", 128, True, "I8"),
}
# New tokens per sequence, step by step: chunked prefills, mixed batches, decode of 1 to 9 rows. The first
# sequence grows past the length from which its keys are divided among threads.
STEPS = [{0: 300}, {0: 290}, {0: 1}, {0: 1, 1: 97, 2: 1, 3: 33}, {r: 1 for r in range(9)}, {8: 96, 1: 2}]
STEPS += [{r: 1 for r in range(n)} for n in (1, 2, 3, 5, 6, 9)] + [{0: 1}] * 20


class Layer:
    """Embedding, one layer and the head, recorded for a team; everything it computes on is its own."""

    def __init__(self, team: cpu.Team, name: str) -> None:
        self.team, (self.dtype, self.group, self.minimum, kv) = team, FORMATS[name]
        self.rng, self.kept = np.random.default_rng(3), []
        self.arrays = {
            name: np.zeros(MOST_TOKENS, np.int32) for name in ("token_ids", "positions", "token_row")
        }
        self.arrays |= {name: np.zeros(MOST_ROWS + 1, np.int32) for name in ("query_start", "context_len")}
        self.arrays |= {
            "row_slot": np.zeros(MOST_ROWS, np.int32),
            "sample_rows": np.zeros(MOST_ROWS, np.int32),
        }
        self.arrays["block_table"] = (
            self.rng.permutation(MOST_ROWS * TABLE).reshape(-1, TABLE).astype(np.int32)
        )
        # Rows that are stored, and rows of which a few candidates are kept.
        self.arrays["head_k"] = np.array([-1, 1, 40] * 3, np.int32)
        self.step = cpu.Step(head_temperature=np.ones(MOST_ROWS, np.float32), **self.arrays)
        self.length = [0] * MOST_ROWS
        self.x, self.logits = (self.zeros(n, w) for n, w in ((MOST_TOKENS, HIDDEN), (MOST_ROWS, VOCAB)))
        self.best = np.zeros(cpu.head_bytes(team.num_threads, MOST_ROWS), np.uint8)
        self.record(kv)

    def zeros(self, rows: int, width: int) -> np.ndarray:
        self.kept.append(np.zeros((rows, width), np.float32))
        return self.kept[-1]

    def row8(self, width: int) -> int:
        """Room for quantized rows, where the weights want them."""
        if not self.group:
            return 0
        self.kept.append(np.zeros((MOST_TOKENS, cpu.quantized_row_bytes(width, self.group)), np.uint8))
        return self.kept[-1].ctypes.data

    def weight(self, n: int, k: int) -> int:
        values = (self.rng.standard_normal((n, k)) * k**-0.5).astype(np.float32)
        packed = cpu.Buffer(cpu.packed_bytes(n, k, self.dtype, self.group, self.minimum))
        cpu.pack_linear(
            *(self.team, "F32", values, n, k, packed, self.dtype), group=self.group, minimum=self.minimum
        )
        self.kept.append(packed)
        return packed.address

    def record(self, kv: str) -> None:
        self.program = cpu.Program(self.team)
        kv_bytes, kv_type = cpu.kv_block_bytes(kv, KV_HEADS, BLOCK, DIM), getattr(cpu, kv)
        space = cpu.attention_workspace(self.team.num_threads, Q_HEADS, KV_HEADS, DIM, MOST_CONTEXT)
        caches = [cpu.Buffer(MOST_ROWS * TABLE * kv_bytes) for _ in "kv"]
        workspace, norm = cpu.Buffer(space), np.ones(HIDDEN, np.float32)
        angles = np.arange(MOST_CONTEXT)[:, None] * 100.0 ** (-np.arange(DIM // 2) / (DIM // 2))
        rope = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        table = self.rng.standard_normal((VOCAB, HIDDEN), np.float32)
        self.kept += [*caches, workspace, norm, rope, table]
        keys, values = (cache.address for cache in caches)
        x, group = self.x.ctypes.data, self.group

        def add(code: int, p: list[int], n: list[int], rows: int = cpu.TOKENS) -> None:
            self.program.add(code, rows, p, n, [DIM**-0.5 if code == cpu.ATTENTION else 1e-5])

        def linear(out: int, source: int, n: int, k: int, mode: int, row8: int = 0) -> None:
            sizes = [n, k, getattr(cpu, self.dtype), group, group, self.minimum, mode]
            add(cpu.LINEAR, [out, source, self.weight(n, k), 0, row8], sizes)

        normed, qkv, mixed = (self.zeros(MOST_TOKENS, w).ctypes.data for w in (HIDDEN, QKV, Q_HEADS * DIM))
        gated, normed8, gated8 = (
            self.zeros(MOST_TOKENS, INNER).ctypes.data,
            self.row8(HIDDEN),
            self.row8(INNER),
        )
        mixed8 = self.row8(Q_HEADS * DIM)
        add(cpu.EMBED, [x, table.ctypes.data], [HIDDEN, cpu.F32, 0, VOCAB])
        add(cpu.RMS_NORM, [normed, x, norm.ctypes.data, 0, normed8], [HIDDEN, 0, 0, group])
        linear(qkv, normed8 or normed, QKV, HIDDEN, STORE)
        heads = [Q_HEADS, KV_HEADS, DIM]
        add(cpu.ROPE_KV, [qkv, rope.ctypes.data, keys, values], [*heads, DIM, BLOCK, kv_type, 0, 0, kv_bytes])
        p = [mixed, qkv, keys, values, 0, 0, 0, workspace.address]
        add(cpu.ATTENTION, p, [*heads, 0, BLOCK, kv_type, 0, space, kv_bytes])
        if group:
            add(cpu.QUANTIZE, [0, mixed, 0, 0, mixed8], [Q_HEADS * DIM, 0, 0, group])
        linear(x, mixed8 or mixed, HIDDEN, Q_HEADS * DIM, ADD)
        add(cpu.RMS_NORM, [normed, x, norm.ctypes.data, 0, normed8], [HIDDEN, 0, 0, group])
        if group == cpu.WHOLE:
            linear(gated, normed8, 2 * INNER, HIDDEN, GATED)
            add(cpu.QUANTIZE, [0, gated, 0, 0, gated8], [INNER, 0, 0, group])
        else:
            linear(gated, normed8 or normed, 2 * INNER, HIDDEN, GATED, gated8)
        linear(x, gated8 or gated, HIDDEN, INNER, ADD)
        last, last8 = self.zeros(MOST_ROWS, HIDDEN).ctypes.data, self.row8(HIDDEN)
        add(cpu.SELECT, [last, x, 0, 0, last8], [HIDDEN, 0, 0, group], cpu.SAMPLES)
        p = [self.logits.ctypes.data, last8 or last, self.weight(VOCAB, HIDDEN), 0, self.best.ctypes.data]
        sizes = [VOCAB, HIDDEN, getattr(cpu, self.dtype), 0, group, self.minimum]
        add(cpu.HEAD, p, sizes, cpu.SAMPLES)

    def run(self, counts: dict[int, int]) -> tuple[bytes, bytes, list[tuple[list[int], list[float]]]]:
        """One step; the rows, the logits and the candidates that it leaves."""
        tokens, samples = sum(counts.values()), len(counts)
        at = 0
        for row, (sequence, count) in enumerate(counts.items()):
            start, span = self.length[sequence], slice(at, at + count)
            self.length[sequence] += count
            self.arrays["token_ids"][span] = (np.arange(start, start + count) * 7 + sequence) % VOCAB
            self.arrays["positions"][span] = np.arange(start, start + count)
            self.arrays["token_row"][span] = row
            self.arrays["context_len"][row] = start + count
            self.arrays["row_slot"][row] = sequence
            at += count
            self.arrays["query_start"][row + 1] = at
            self.arrays["sample_rows"][row] = at - 1
        self.step.set_counts(tokens, samples, samples)
        self.program.run(self.step)
        assert np.isfinite(self.x[:tokens]).all()
        candidates = [listed(best) for best in self.best.view(BEST)[:samples]]
        return self.x[:tokens].tobytes(), self.logits[:samples].tobytes(), candidates


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_steps_do_not_depend_on_the_number_of_threads(level: str, name: str) -> None:
    layers = [Layer(cpu.Team(threads, level), name) for threads in (1, 2, 3, 4, 7)]
    for i, counts in enumerate(STEPS):
        alone, *others = (layer.run(counts) for layer in layers)
        assert all(other == alone for other in others), (i, counts)
        if i % 4 == 0:
            time.sleep(0.001)  # threads that spin fall asleep
