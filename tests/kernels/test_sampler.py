"""The sampler against its definition in float64 and against the native CPU sampler, token by token."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine.kernels.sampler import Sampled, SamplerWorkspace, sample
from asyncengine.kernels.slot_params import RECORD_WORDS, pack_record

from . import sampler_model as model

CPU = torch.device("cpu")
GAP = 2e-5
"""Scores closer than this may be drawn in another order: they are float32 in the kernel."""


class Slots:
    """Records of slots, and the vectors whose addresses they hold."""

    def __init__(self, rows: Sequence[dict[str, Any]], vocab: int) -> None:
        self.vocab = vocab
        self.counts: dict[int, np.ndarray] = {}
        self._held: list[np.ndarray] = []
        records = b"".join(self._record(slot, row) for slot, row in enumerate(rows))
        self.params = torch.frombuffer(bytearray(records), dtype=torch.int32).reshape(-1, RECORD_WORDS)
        self.last_token = torch.full((len(rows),), -9, dtype=torch.int32)

    def _address(self, vector: np.ndarray) -> int:
        self._held.append(vector)
        return int(vector.ctypes.data)

    def _bits(self, ids: Sequence[int]) -> int:
        bits = np.zeros((self.vocab + 31) // 32 * 32, np.uint8)
        bits[list(ids)] = 1
        return self._address(np.packbits(bits, bitorder="little").view(np.int32))

    def _record(self, slot: int, row: dict[str, Any]) -> bytes:
        fields = {k: v for k, v in row.items() if k != "position"}
        if "counts" in row:
            self.counts[slot] = np.array(row["counts"], np.int32)
            fields["counts"] = self._address(self.counts[slot])
        if "bias" in row:
            fields["bias"] = self._address(np.array(row["bias"], np.float32))
        for name in ("prompt", "allowed", "banned"):
            if name in row:
                fields[name] = self._bits(row[name])
        return pack_record(**fields)


def draw(
    x: np.ndarray, rows: Sequence[dict[str, Any]], *, width: int = 0, room: int = 16384, dtype: Any = None
) -> tuple[Sampled, Slots]:
    """Row i is drawn from slot n - 1 - i."""
    n, vocab = x.shape
    logits = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(dtype or torch.float32)
    before = logits.clone()
    slots = Slots(rows[::-1], vocab)
    out = Sampled.allocate(n, width, CPU)
    for tensor in out:
        tensor.fill_(-7)
    sample(
        logits,
        slots.params,
        torch.arange(n - 1, -1, -1, dtype=torch.int32),
        torch.tensor([row.get("position", 0) for row in rows], dtype=torch.int32),
        slots.last_token,
        out,
        SamplerWorkspace.allocate(n, vocab, CPU, room),
    )
    assert torch.equal(before.view(torch.uint8), logits.view(torch.uint8))
    assert torch.equal(slots.last_token.flip(0), out.tokens)
    return out, slots


def agree(x: np.ndarray, rows: Sequence[dict[str, Any]], tokens: torch.Tensor) -> None:
    near = 0
    for s, row in enumerate(rows):
        expected, gap = model.drawn(x[s], row)
        if gap < GAP:
            near += 1
            assert int(tokens[s]) in model.scores(x[s], row)
        else:
            assert int(tokens[s]) == expected, (s, row, gap)
    assert near <= max(1, len(rows) // 20)


def every_option(n: int, vocab: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(vocab)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        row: dict[str, Any] = {"temperature": [0.0, 0.3, 1.0, 2.5][i % 4]}
        row |= {"seed": int(rng.integers(1 << 63)) * 2 + 1, "position": int(rng.integers(1 << 20))}
        if i % 3 == 0:
            row["top_k"] = int(rng.integers(1, vocab + 2))
        if i % 5 < 2:
            row["top_p"] = float(np.float32(rng.uniform(0.05, 0.99)))
        if i % 7 < 2:
            row["min_p"] = float(np.float32(rng.uniform(0, 0.5)))
        if i % 4 < 2:
            ids = np.flatnonzero(rng.random(vocab) < 0.2)
            row |= {"repetition": 1.25, "counts": rng.poisson(0.3, vocab), "prompt": ids}
        if i % 8 < 3:
            row |= {"counts": rng.poisson(0.3, vocab), "presence": 0.75, "frequency": -0.5}
        if i % 6 == 0 and vocab > 2:
            row |= {"banned": rng.choice(vocab, 2, replace=False)}
            row["min_len"] = row["position"] + int(rng.integers(0, 2))
        if i % 9 == 0:
            row["bias"] = rng.normal(0, 2, vocab).astype(np.float32)
        if i % 10 == 0:
            row["allowed"] = rng.choice(vocab, vocab // 2 + 1, replace=False)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("vocab", "n", "room"), [(1, 9, 64), (2, 12, 64), (64, 20, 64), (1000, 40, 16384), (5000, 12, 64)]
)
def test_every_option_against_the_definition(vocab: int, n: int, room: int) -> None:
    """With room for 64 ids the larger vocabularies mostly do without the list."""
    rows = every_option(n, vocab)
    x = np.random.default_rng(1).normal(0, 3, (len(rows), vocab)).astype(np.float32)
    out, slots = draw(x, rows, room=room)
    agree(x, rows, out.tokens)
    for i, row in enumerate(rows):
        if "counts" in row:
            expected = np.array(row["counts"], np.int32)
            expected[int(out.tokens[i])] += 1
            np.testing.assert_array_equal(slots.counts[len(rows) - 1 - i], expected)


def test_a_vocabulary_of_many_tiles_and_the_native_sampler() -> None:
    cpu = pytest.importorskip("asyncengine._fast.cpu")
    vocab = 9_000
    rows = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 400, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 0.9, "top_p": 0.999},
    ]
    rows = [row | {"seed": 2**63 + 77 * i, "position": 1000 + i} for i, row in enumerate(rows)]
    x = np.random.default_rng(3).normal(0, 3, (len(rows), vocab)).astype(np.float32)
    arrays = {
        name: np.array([row.get(name, default) for row in rows], dtype)
        for name, dtype, default in (
            ("temperature", np.float32, 0.0),
            ("top_k", np.int32, 0),
            ("top_p", np.float32, 1.0),
            ("min_p", np.float32, 0.0),
            ("seed", np.uint64, 0),
            ("position", np.int64, 0),
        )
    }
    native = np.zeros(len(rows), np.int32)
    cpu.sample(cpu.Team(1), x.ctypes.data, vocab, native, **arrays)
    out, _ = draw(x, rows)
    agree(x, rows, out.tokens)
    for s, row in enumerate(rows):
        if model.drawn(x[s], row)[1] > GAP:
            assert int(out.tokens[s]) == native[s], row


def test_ties_and_extremes() -> None:
    """Rounded values: every cut falls among ties, which go to the lower id."""
    rng = np.random.default_rng(8)
    values = np.array([-np.inf, -80.0, -2.0, -1.0, 0.0, -0.0, 1.0, 2.0, 3.0e4], np.float32)
    rows = [
        {"temperature": 1.0, "top_k": int(k), "top_p": p, "seed": i, "position": i}
        for i, (k, p) in enumerate((k, p) for k in (0, 1, 5, 17, 60) for p in (1.0, 0.5, 0.95))
    ]
    x = rng.choice(values[:-1], (len(rows), 70)).astype(np.float32)
    x[::4, 5] = values[-1]
    x[0] = -3.0
    agree(x, rows, draw(x, rows)[0].tokens)


def test_top_p_keeps_the_smallest_set() -> None:
    # Powers of two: every mass is exact. Weights 8 4 2 1 1 of 16, spread over a vocabulary of -inf.
    x = np.full((1, 300), -np.inf, np.float32)
    x[0, [250, 3, 77, 130, 40]] = np.log(2.0) * np.array([3, 2, 1, 0, 0])
    order = [250, 3, 77, 40, 130]
    # Positions at which each kept id is drawn, and at which the noise favours the next one.
    noise = {p: [model.gumbel(5, p, i) + float(x[0, i]) for i in order] for p in range(200)}
    for top_p, kept in [(1e-9, 1), (0.49, 1), (0.74, 2), (0.88, 4), (0.95, 5)]:
        favourite = {int(np.argmax(scores)): p for p, scores in noise.items()}
        positions = [favourite[kept - 1], favourite[min(kept, 4)]]
        rows = [{"temperature": 1.0, "top_p": top_p, "seed": 5, "position": p} for p in positions]
        drawn = draw(np.repeat(x, 2, axis=0), rows)[0].tokens.tolist()
        assert drawn[0] == order[kept - 1] and drawn[1] in order[:kept], top_p


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_that_cannot_be_drawn_from_fail_alone() -> None:
    x = np.zeros((7, 3000), np.float32)
    x[0, 2999], x[1, 0], x[2], x[3, 50], x[4, 7] = np.nan, -np.nan, -np.inf, np.inf, 1.0
    base = {"top_k": 1, "seed": 1, "position": 1}
    for temperature in (0.0, 1.0):
        rows: list[dict[str, Any]] = [base | {"temperature": temperature} for _ in range(7)]
        rows[5] |= {"banned": range(3000), "min_len": 2}
        rows[6] |= {"allowed": [2048]}
        out, _ = draw(x, rows)
        assert out.tokens.tolist() == [-1, -1, -1, -1, 7, -1, 2048]


def test_few_ids_are_allowed() -> None:
    """Fewer than top-k keeps, in a row that does not fit the list."""
    x = np.random.default_rng(6).normal(0, 1, (4, 3000)).astype(np.float32)
    base = {"temperature": 1.0, "allowed": [3, 2500, 2047], "position": 1}
    rows = [
        base | {"seed": i, **cut} for i, cut in enumerate(({"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}))
    ]
    rows.append(base | {"top_k": 2, "top_p": 0.9, "seed": 5, "allowed": [1]})
    agree(x, rows, draw(x, rows, room=64)[0].tokens)


def test_rows_of_padding_are_passed_over() -> None:
    x = torch.zeros((3, 100))
    x[:, 5] = 1.0
    slots = Slots([{}, {}, {}], 100)
    out = Sampled.allocate(3, 0, CPU)
    workspace = SamplerWorkspace.allocate(3, 100, CPU)
    rows = torch.tensor([2, -1, -1], dtype=torch.int32)
    sample(x, slots.params, rows, torch.zeros(3, dtype=torch.int32), slots.last_token, out, workspace)
    assert out.tokens.tolist() == [5, 0, 0] and slots.last_token.tolist() == [-9, -9, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision(dtype: torch.dtype) -> None:
    x = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (4, 2100))).to(dtype)
    rows = [{"temperature": 1.0, "top_p": 0.9, "seed": i, "position": 3} for i in range(3)] + [{}]
    exact = x.float().numpy()
    agree(exact, rows, draw(exact, rows, dtype=dtype)[0].tokens)


@pytest.mark.parametrize(("vocab", "room"), [(5, 16384), (3001, 16384), (3001, 10)])
def test_logprobs_are_of_the_raw_distribution(vocab: int, room: int) -> None:
    rng = np.random.default_rng(vocab)
    x = np.round(rng.normal(0, 4, (6, vocab)), 1).astype(np.float32)  # rounded: ties
    x[5, 1] = np.nan
    wanted = [-1, 0, 1, 5, 8, 2]
    rows = [
        {"temperature": 1.5, "seed": 3, "position": 2, "top_k": 3, "num_logprobs": n, "bias": -x[0]}
        for n in wanted
    ]
    rows[1] |= {"temperature": 0.0}
    out, _ = draw(x, rows, width=8, room=room)
    agree(x, rows, out.tokens)
    assert out.rank[0] == -7 and out.logprob[0] == -7  # not asked for
    assert out.rank[5] == 0 and math.isnan(out.logprob[5]) and out.top_ids[5].tolist() == [-1, -1] + [-7] * 6
    for s in range(1, 5):
        exact, order, n = model.log_probabilities(x[s]), model.ranked(x[s]), wanted[s]
        k, token = min(n, vocab), int(out.tokens[s])
        assert out.rank[s] == 1 + order.index(token)
        assert float(out.logprob[s]) == pytest.approx(exact[token], abs=2e-6, rel=1e-6)
        assert out.top_ids[s].tolist() == order[:k] + [-1] * (n - k) + [-7] * (8 - n)
        np.testing.assert_allclose(out.top_logprobs[s, :k], exact[order[:k]], rtol=1e-6, atol=2e-6)
        assert (out.top_logprobs[s, k:n] == -math.inf).all()
