"""HEAD against float64 products, and draws from what it keeps against the definition of the sampler."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS, ROUNDING, narrowed, team, widened

BEST = np.dtype([("count", np.int32), ("bound", np.float32), ("words", np.uint64, 64)])
NAMES = ("token_ids", "positions", "token_row", "query_start", "context_len", "row_slot", "sample_rows")
TYPES = {"f32": ("F32", cpu.F32), "bf16": ("BF16", cpu.BF16), "f16": ("F16", cpu.F16)}


class Head:
    """One HEAD over a weight [n, width], and the logits that LINEAR gives."""

    def __init__(self, t: cpu.Team, weight: np.ndarray, dtype: str, bias: np.ndarray | None = None) -> None:
        self.team, self.n, self.width, self.bias = t, *weight.shape, bias
        name, self.type = TYPES[dtype]
        stored = np.ascontiguousarray(narrowed(weight, dtype))
        self.weight = cpu.Buffer(cpu.packed_bytes(self.n, self.width, name))
        cpu.pack_linear(t, name, stored.data, self.n, self.width, self.weight, name)

    def run(self, x: np.ndarray, k: np.ndarray | None, temperature: np.ndarray | None) -> None:
        """Fills `logits` [S, n] and `best` [S]; `k` of None is the plain linear."""
        rows = len(x)
        self.logits = np.full((rows, self.n), 7.5, np.float32)
        self.memory = np.zeros(cpu.head_bytes(self.team.num_threads, rows), np.uint8)
        zeros = np.zeros(rows + 1, np.int32)
        step = cpu.Step(
            block_table=np.zeros((1, 1), np.int32),
            head_k=k,
            head_temperature=temperature,
            **dict.fromkeys(NAMES, zeros),
        )
        step.set_counts(0, 0, rows)
        program = cpu.Program(self.team)
        bias = 0 if self.bias is None else self.bias.ctypes.data
        p = [self.logits.ctypes.data, x.ctypes.data, self.weight.address, bias, self.memory.ctypes.data]
        n = [self.n, self.width, self.type]
        program.add(cpu.LINEAR if k is None else cpu.HEAD, cpu.SAMPLES, p[:4] if k is None else p, n)
        program.run(step)
        self.best = self.memory[: rows * BEST.itemsize].view(BEST)


def ints(values) -> np.ndarray:
    return np.array(values, np.int32)


def floats(values) -> np.ndarray:
    return np.array(values, np.float32)


def listed(best: np.void) -> tuple[list[int], list[float]]:
    """Ids and values of a row's words, by the definition of their bits."""
    words = best["words"][: best["count"]]
    keys = 0x7F800000 - (words >> np.uint64(32)).astype(np.int64)
    bits = np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).astype(np.int32)
    return (words & np.uint64(0xFFFFFFFF)).astype(int).tolist(), bits.view(np.float32).tolist()


def expected(logits: np.ndarray, k: int, temperature: float) -> tuple[list[int], list[float]]:
    y = logits / np.float32(temperature)
    order = sorted((i for i in range(len(y)) if y[i] > -np.inf), key=lambda i: (-y[i], i))[:k]
    return order, [float(y[i]) for i in order]


def modes(rows: int) -> tuple[np.ndarray, np.ndarray]:
    k = ints([[1, -1, 40, 64, 5][i % 5] for i in range(rows)])
    return k, floats([[1.0, 0.7, 1.3][i % 3] if k[i] > 1 else 1.0 for i in range(rows)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 3, 13, 30])
def test_rows_are_stored_or_reduced(level: str, dtype: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    weight = rng.normal(0, 1, (1111, 48)).astype(np.float32)
    weight[700:800] = weight[:100]  # equal logits
    bias = floats(np.tile(rng.normal(0, 1, 100), 12)[:1111])
    padded = np.zeros(1120, np.float32)
    padded[:1111] = bias
    x = rng.normal(0, 1, (rows, 48)).astype(np.float32)
    exact = x.astype(np.float64) @ widened(narrowed(weight, dtype)).T + bias
    k, temperature = modes(rows)
    alone = []
    for threads in (1, 3):
        head = Head(team(level, threads), weight, dtype, padded)
        head.run(x, None, None)
        linear = head.logits
        np.testing.assert_allclose(linear, exact, atol=0.15 if level in ROUNDING else 1e-4)
        head.run(x, k, temperature)
        for s in range(rows):
            if k[s] < 0:
                np.testing.assert_array_equal(head.logits[s], linear[s])
            else:
                assert (head.logits[s] == 7.5).all()
                assert listed(head.best[s]) == expected(linear[s], k[s], temperature[s])
        alone.append([listed(head.best[s]) for s in range(rows)])
    assert alone[0] == alone[1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype, code", [("Q8", cpu.Q8), ("Q4", cpu.Q4)])
def test_quantized_weights_give_the_logits_of_linear(level: str, dtype: str, code: int) -> None:
    rng = np.random.default_rng(5)
    n, width, group, rows = 1000, 96, 32, 14
    weight, x = (rng.normal(0, 1, (m, width)).astype(np.float32) for m in (n, rows))
    packed = cpu.Buffer(cpu.packed_bytes(n, width, dtype, group, True))
    t = team(level, 2)
    cpu.pack_linear(t, "F32", weight.data, n, width, packed, dtype, group=group, minimum=True)
    row8 = np.zeros((rows, cpu.quantized_row_bytes(width, group)), np.int8)
    k, temperature = modes(rows)
    results = []
    for code_of_op in (cpu.LINEAR, cpu.HEAD):
        logits = np.zeros((rows, n), np.float32)
        best = np.zeros(cpu.head_bytes(2, rows), np.uint8)
        arrays = dict.fromkeys(NAMES, np.zeros(rows + 1, np.int32))
        step = cpu.Step(
            block_table=np.zeros((1, 1), np.int32), head_k=k, head_temperature=temperature, **arrays
        )
        step.set_counts(0, 0, rows)
        program = cpu.Program(t)
        program.add(
            cpu.QUANTIZE, cpu.SAMPLES, [0, x.ctypes.data, 0, 0, row8.ctypes.data], [width, 0, 0, group]
        )
        p = [logits.ctypes.data, row8.ctypes.data, packed.address, 0, best.ctypes.data]
        if code_of_op == cpu.LINEAR:
            p.pop()
        program.add(code_of_op, cpu.SAMPLES, p, [n, width, code, 0, group, 1])
        program.run(step)
        results.append((logits, best[: rows * BEST.itemsize].view(BEST)))
    (linear, _), (logits, best) = results
    np.testing.assert_allclose(linear, x @ weight.T, atol=0.5 if dtype == "Q8" else 6)
    for s in range(rows):
        if k[s] < 0:
            np.testing.assert_array_equal(logits[s], linear[s])
        else:
            assert listed(best[s]) == expected(linear[s], k[s], temperature[s])


@pytest.mark.parametrize("level", LEVELS)
def test_unusable_and_extreme_rows(level: str) -> None:
    weight = np.eye(100, dtype=np.float32)  # logits are x
    x = np.zeros((6, 100), np.float32)
    x[0, 99] = np.nan
    x[1, 3] = np.inf
    x[2] = -1e30
    x[4, [7, 50]] = [-0.0, 3.0]
    x[5] = np.arange(100)
    head = Head(team(level, 2), weight, "f32")
    head.run(x, ints([4, 4, 4, 4, 2, 1]), floats([1, 1, 1, 1, 1, 1]))
    counts = head.best["count"].tolist()
    assert counts[0] == -1 and counts[1] == -1
    assert [listed(b)[0] for b in head.best[2:]] == [[0, 1, 2, 3], [0, 1, 2, 3], [50, 0], [99]]
    tokens = np.zeros(6, np.int32)
    cpu.sample(
        team(level, 2),
        head.logits.ctypes.data,
        100,
        tokens,
        head_k=ints([4, 4, 4, 4, 2, 1]),
        best=head.memory.ctypes.data,
    )
    assert tokens.tolist() == [-1, -1, 0, 0, 50, 99]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_draws_from_candidates_are_those_from_logits(level: str, threads: int) -> None:
    rng = np.random.default_rng(threads)
    rows, n = 48, 3000
    weight = rng.normal(0, 1, (n, 16)).astype(np.float32)
    weight[1000:2000] = weight[:1000]
    head = Head(team(level, threads), weight, "f32")
    for trial in range(12):
        x = rng.normal(0, [0.1, 1.0, 3.0][trial % 3], (rows, 16)).astype(np.float32)
        if trial % 4 == 0:
            x = np.round(x * 2) / 2
        greedy = rng.random(rows) < 0.2
        t = np.where(greedy, 0, rng.choice([0.3, 0.8, 1.0, 1.7], rows)).astype(np.float32)
        k = np.where(greedy, 1, rng.integers(1, 65, rows)).astype(np.int32)
        options = {
            "temperature": t,
            "top_k": k,
            "top_p": floats(rng.choice([0.5, 0.9, 1.0], rows)),
            "min_p": floats(rng.choice([0.0, 0.05], rows)),
            "seed": rng.integers(1 << 62, size=rows).astype(np.uint64),
            "position": rng.integers(1 << 20, size=rows),
        }
        head_k = np.where(rng.random(rows) < 0.8, k, -1).astype(np.int32)
        head.run(x, None, None)
        whole, reduced = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        cpu.sample(head.team, head.logits.ctypes.data, n, whole, **options)
        head.run(x, head_k, np.where(greedy, 1, t).astype(np.float32))
        cpu.sample(
            head.team,
            head.logits.ctypes.data,
            n,
            reduced,
            head_k=head_k,
            best=head.memory.ctypes.data,
            **options,
        )
        assert whole.tolist() == reduced.tolist() and min(whole) >= 0

        # The same by slot, where every row is reduced; nothing is drawn where one is not.
        slots = rng.permutation(rows + 5)[:rows].astype(np.int32)
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        by_slot = {name: np.zeros(rows + 5, options[name].dtype) for name in names}
        for name, values in by_slot.items():
            values[slots] = options[name]
        head_t, whole_below = np.ones(rows + 5, np.float32), np.zeros(rows + 5, np.int32)
        head_t[slots] = np.where(greedy, 1, t)
        workspace = cpu.Buffer(cpu.sample_workspace(1, n))
        draws = cpu.HeadDraws(
            *(head.team, n, workspace.address),
            head_k=by_slot["top_k"],
            head_temperature=head_t,
            whole_below=whole_below,
            **by_slot,
        )
        positions = options["position"].astype(np.int32)
        modes_k, modes_t = ints([0] * rows), floats([0] * rows)
        whole_below[slots[7]] = positions[7] + 1
        whole_below[slots[8]] = positions[8]
        draws.modes(slots, positions, modes_k, modes_t)
        assert modes_k.tolist() == [-1 if s == 7 else k[s] for s in range(rows)]
        np.testing.assert_array_equal(modes_t, head_t[slots])
        drawn = np.full(rows, 5, np.int32)
        assert draws.draw(head.memory.ctypes.data, modes_k, slots, positions, drawn) == -1
        assert (drawn == 5).all()
        head.run(x, k, modes_t)
        assert draws.draw(head.memory.ctypes.data, k, slots, positions, drawn) == 0
        assert drawn.tolist() == whole.tolist()


@pytest.mark.parametrize("level", LEVELS)
def test_failed_rows_are_counted(level: str) -> None:
    head = Head(team(level, 2), np.eye(70, dtype=np.float32), "f32")
    x = np.zeros((3, 70), np.float32)
    x[0, 3], x[1, 9], x[2, 69] = np.nan, 1, np.inf
    k = ints([1, 1, 1])
    head.run(x, k, floats([1, 1, 1]))
    slots = dict(temperature=floats([0, 0]), top_k=k[:2], top_p=floats([1, 1]), min_p=floats([0, 0]))
    workspace = cpu.Buffer(cpu.sample_workspace(1, 70))
    draws = cpu.HeadDraws(
        head.team, 70, workspace.address,
        head_k=k[:2], head_temperature=floats([1, 1]), whole_below=ints([0, 0]),
        seed=np.zeros(2, np.uint64), **slots,
    )  # fmt: skip
    tokens = ints([5, 5, 5])
    assert draws.draw(head.memory.ctypes.data, k, ints([1, 0, 1]), ints([4, 4, 5]), tokens) == 2
    assert tokens.tolist() == [-1, 9, -1]
    for bad in (ints([1, 2, 1]), ints([1, -1, 1]), ints([0, 1])):
        with pytest.raises(ValueError, match="slot"):
            draws.draw(head.memory.ctypes.data, k, bad, ints([4, 4, 5]), tokens)
        if len(bad) == 3:
            with pytest.raises(ValueError, match="slot"):
                draws.modes(bad, ints([4, 4, 5]), k, floats([0, 0, 0]))
    with pytest.raises(ValueError, match="positions"):
        draws.draw(head.memory.ctypes.data, k, ints([1, 0, 1]), ints([4, 4]), tokens)


def test_temperatures_that_make_values_meet() -> None:
    """Where x / temperature rounds to one value, ids decide: as for logits that were divided before."""
    x = np.nextafter(np.float32(2), np.float32(0)) - np.arange(40, dtype=np.float32)[::-1] * np.float32(
        2**-23
    )
    x = np.tile(x, 3)[None].astype(np.float32)
    for t in (1.5, 1.9, 0.61, 3.7):
        for level in LEVELS:
            head = Head(team(level, 2), np.eye(120, dtype=np.float32), "f32")
            head.run(x, ints([7]), floats([t]))
            assert listed(head.best[0]) == expected(x[0], 7, t)


def test_arrays_need_each_other() -> None:
    zeros = np.zeros(4, np.int32)
    table = np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="need each other"):
        cpu.Step(block_table=table, head_k=zeros, **dict.fromkeys(NAMES, zeros))
    step = cpu.Step(
        block_table=table, head_k=zeros[:2], head_temperature=floats([1, 1]), **dict.fromkeys(NAMES, zeros)
    )
    with pytest.raises(ValueError, match="exceed"):
        step.set_counts(0, 0, 3)
    with pytest.raises(ValueError, match="need each other"):
        cpu.sample(team("portable"), zeros.ctypes.data, 4, zeros.copy(), head_k=zeros)
