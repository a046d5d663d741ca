"""The sampler against a plain-Python model of its definition (`_fast/cpu/sample.h`)."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine._fast import cpu

from ..noise import MASK, gumbel

LEVELS = cpu.levels()
OFF = -math.inf


@cache
def team(level: str, threads: int = 1) -> cpu.Team:
    return cpu.Team(threads, level)


# -- the model -------------------------------------------------------------------------------------------


def penalized(x: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    y = x.astype(np.float32).copy()
    counts, prompt = row.get("counts"), row.get("prompt")
    r, f, p = (np.float32(row.get(k, d)) for k, d in (("repetition", 1), ("frequency", 0), ("presence", 0)))
    for i in range(len(y)):
        n = 0 if counts is None else int(counts[i])
        if n or (prompt is not None and prompt[i]):
            y[i] = y[i] / r if y[i] > 0 else y[i] * r
        if n:
            y[i] -= f * np.float32(n) + p
    for i in row.get("banned", ()):
        y[i] = -np.inf
    return y


def ranked(y: np.ndarray) -> list[int]:
    return sorted(range(len(y)), key=lambda i: (-y[i], i))


def candidates(y: np.ndarray, row: dict[str, Any]) -> list[int]:
    """What top-k, top-p and min-p leave, most likely first."""
    order = [i for i in ranked(y) if y[i] > -np.inf]
    k = row.get("top_k", 0)
    if k > 0:
        order = order[:k]
    weight = {i: math.exp(float(y[i]) - float(y[order[0]])) for i in order}
    if row.get("top_p", 1.0) < 1.0:
        target, mass = float(np.float32(row["top_p"])) * math.fsum(weight.values()), 0.0
        for n, i in enumerate(order):
            mass += weight[i]
            if mass >= target:
                order = order[: n + 1]
                break
    return [i for i in order if weight[i] >= float(np.float32(row.get("min_p", 0.0)))]


def model(x: np.ndarray, row: dict[str, Any]) -> int:
    if np.isnan(x).any() or not np.isfinite(x.max()):
        return -1
    y = penalized(x, row)
    if y.max() == -np.inf:
        return -1
    if row.get("temperature", 0.0) < 1e-5:
        return ranked(y)[0]
    y = y / np.float32(row["temperature"])
    score = {i: float(y[i]) + gumbel(row["seed"], row["position"], i) for i in candidates(y, row)}
    return min(score, key=lambda i: (-score[i], i))


# -- the call --------------------------------------------------------------------------------------------

FIELDS = {
    "temperature": (np.float32, 0.0),
    "top_k": (np.int32, 0),
    "top_p": (np.float32, 1.0),
    "min_p": (np.float32, 0.0),
    "presence": (np.float32, 0.0),
    "frequency": (np.float32, 0.0),
    "repetition": (np.float32, 1.0),
    "seed": (np.uint64, 0),
    "position": (np.int64, 0),
}


def draw(t: cpu.Team, x: np.ndarray, rows: list[dict[str, Any]], **more: Any) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    arrays = {
        name: np.array([row.get(name, default) for row in rows], dtype)
        for name, (dtype, default) in FIELDS.items()
    }
    held = []
    for name, key, dtype in (("counts", "counts", np.int32), ("prompt_mask", "prompt", np.uint8)):
        values = [None if row.get(key) is None else np.ascontiguousarray(row[key], dtype) for row in rows]
        held.append(values)
        arrays[name] = np.array([0 if v is None else v.ctypes.data for v in values], np.uint64)
    banned = [list(row.get("banned", ())) for row in rows]
    arrays["banned_start"] = np.cumsum([0] + [len(b) for b in banned], dtype=np.int32)
    arrays["banned"] = np.array([i for b in banned for i in b], np.int32)
    tokens = np.full(len(rows), -7, np.int32)
    before = x.copy()
    cpu.sample(t, x.ctypes.data, x.shape[1], tokens, **arrays, **more)
    np.testing.assert_array_equal(x, before)  # NaNs included
    return tokens


def agree(x: np.ndarray, rows: list[dict[str, Any]], tokens: np.ndarray) -> None:
    for s, row in enumerate(rows):
        expected = model(x[s], row)
        assert tokens[s] == expected, (s, row, expected, int(tokens[s]))


# -- tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 1000])
def test_every_option_against_the_model(level: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows: list[dict[str, Any]] = []
    for i in range(60):
        row: dict[str, Any] = {"temperature": [0.0, 0.3, 1.0, 2.5][i % 4]}
        row |= {"seed": int(rng.integers(1 << 63)) * 2 + 1, "position": int(rng.integers(1 << 20))}
        if i % 3 == 0:
            row["top_k"] = int(rng.integers(1, vocab + 2))
        if i % 5 < 2:
            row["top_p"] = float(rng.uniform(0.05, 0.99))
        if i % 7 < 2:
            row["min_p"] = float(rng.uniform(0, 0.5))
        if i % 4 < 2:
            row |= {"repetition": 1.3, "counts": rng.poisson(0.3, vocab), "prompt": rng.random(vocab) < 0.2}
        if i % 8 < 3:
            row |= {"counts": rng.poisson(0.3, vocab), "presence": 0.7, "frequency": -0.4}
        if i % 6 == 0 and vocab > 2:
            row["banned"] = rng.choice(vocab, 2, replace=False)
        rows.append(row)
    x = rng.normal(0, 3, (len(rows), vocab)).astype(np.float32)
    agree(x, rows, draw(team(level), x, rows))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ties_and_extremes_against_the_model(data: st.DataObject) -> None:
    values = st.sampled_from([-math.inf, -80.0, -2.0, -1.0, 0.0, 1.0, 1.0, 2.0, 3.0e4])
    x = np.array(data.draw(st.lists(values, min_size=1, max_size=70)), np.float32)[None]
    row = {
        "temperature": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "seed": data.draw(st.integers(0, MASK)),
        "position": data.draw(st.integers(0, 1 << 31)),
        "top_k": data.draw(st.integers(-1, 80)),
        "min_p": data.draw(st.sampled_from([0.0, 1.0])),
    }
    level = data.draw(st.sampled_from(LEVELS))
    agree(x, [row], draw(team(level), x, [row]))


@pytest.mark.parametrize("level", LEVELS)
def test_top_p_keeps_the_smallest_set(level: str) -> None:
    # Powers of two: every mass is exact. Weights 8 4 2 1 1 of 16, spread over a vocabulary of -inf.
    x = np.full((1, 300), OFF, np.float32)
    ids = [250, 3, 77, 130, 40]
    x[0, ids] = np.log(2.0) * np.array([3, 2, 1, 0, 0])
    order = [250, 3, 77, 40, 130]
    for top_p, kept in [
        (1e-9, 1),
        (0.49, 1),
        (0.51, 2),
        (0.74, 2),
        (0.76, 3),
        (0.88, 4),
        (0.95, 5),
        (1.0, 5),
    ]:
        rows = [{"temperature": 1.0, "top_p": top_p, "seed": 5, "position": p} for p in range(200)]
        drawn = set(draw(team(level), np.repeat(x, 200, axis=0), rows).tolist())
        assert drawn == set(order[:kept]), top_p


@pytest.mark.parametrize("level", LEVELS)
def test_one_token_is_left(level: str) -> None:
    x = np.random.default_rng(0).normal(0, 1, (1, 500)).astype(np.float32)
    best = int(x.argmax())
    noise = {"temperature": 5.0, "seed": 9, "position": 4}
    for row in (
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"banned": [i for i in range(500) if i != best]},
    ):
        assert draw(team(level), x, [noise | row])[0] == best
    assert draw(team(level), x, [noise | {"banned": range(500)}])[0] == -1


@pytest.mark.parametrize("level", LEVELS)
def test_unusable_rows_fail_alone(level: str) -> None:
    x = np.zeros((5, 100), np.float32)
    x[0, 99] = np.nan
    x[1, 0] = -np.nan
    x[2] = -np.inf
    x[3, 50] = np.inf
    x[4, 7] = 1.0
    for temperature in (0.0, 1.0):
        rows = [{"temperature": temperature, "top_k": 1, "seed": 1, "position": 1}] * 5
        assert draw(team(level), x, rows).tolist() == [-1, -1, -1, -1, 7]


def test_without_options_is_greedy_with_the_lowest_id_on_ties() -> None:
    x = np.array([[0.0, 2.0, 2.0, 1.0], [-3.0, -3.0, -4.0, -5.0], [-0.0, 0.0, -1.0, -1.0]], np.float32)
    tokens = np.zeros(3, np.int32)
    for level in LEVELS:
        cpu.sample(team(level), x.ctypes.data, 4, tokens)
        assert tokens.tolist() == [1, 0, 0]


@pytest.mark.parametrize("level", LEVELS)
def test_draws_follow_the_distribution(level: str) -> None:
    """Chi-square of 40,000 draws; 99.99% quantile by the Wilson-Hilferty approximation."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1.5, 200).astype(np.float32)
    p = np.exp(x.astype(np.float64) / 0.8)
    p /= p.sum()
    n, seeds = 40_000, rng.integers(1 << 62, size=4)
    rows = [{"temperature": 0.8, "seed": int(seeds[i % 4]), "position": i // 4} for i in range(n)]
    counts = np.bincount(draw(team(level), np.broadcast_to(x, (n, 200)), rows), minlength=200)
    chi2, df = float(((counts - n * p) ** 2 / (n * p)).sum()), 199
    assert chi2 < df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


def test_noise_is_a_standard_gumbel() -> None:
    """Kolmogorov-Smirnov, for neighbouring seeds, positions and ids: u = exp(-exp(-g)) is uniform."""
    grids = (
        [(s, 7, 11) for s in range(4000)],
        [(3, p, 11) for p in range(4000)],
        [(3, 7, t) for t in range(4000)],
    )
    for grid in grids:
        u = np.sort([math.exp(-math.exp(-gumbel(*point))) for point in grid])
        n = len(u)
        distance = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
        assert distance < 2.2 / math.sqrt(n)  # p < 1e-4


def test_results_depend_on_nothing_but_the_row() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(0, 2, (24, 5000)).astype(np.float32)
    rows = [
        {"temperature": 0.9, "top_p": 0.9 if i % 2 else 1.0, "seed": i, "position": 3 * i} for i in range(24)
    ]
    for level in LEVELS:
        alone = [int(draw(team(level), x[i : i + 1], [rows[i]])[0]) for i in range(24)]
        assert draw(team(level, 2), x, rows).tolist() == alone
    assert {tuple(draw(team(level), x, rows).tolist()) for level in LEVELS} == {tuple(alone)}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [2, 3])
def test_rows_that_threads_share(level: str, threads: int) -> None:
    """Fewer rows than threads, every option: by the model, and logprobs as of one thread."""
    rng = np.random.default_rng(threads)
    vocab = 5000
    x = rng.normal(0, 2, (8, vocab)).astype(np.float32)
    x[6:] = np.round(x[6:])  # ties
    noise = {"temperature": 0.9, "seed": 77, "position": 3}
    history = {"counts": rng.poisson(0.3, vocab), "prompt": rng.random(vocab) < 0.2, "repetition": 1.3}
    rows: list[dict[str, Any]] = [
        {},
        noise,
        noise | {"top_p": 0.8},
        noise | {"top_k": 100, "top_p": 0.9},
        noise | {"min_p": 0.1} | history,
        noise | {"top_k": 20} | history,
        noise | {"top_k": 700},
        {"banned": [int(x[7].argmax())]} | history,
    ]
    for s, row in enumerate(rows):
        reports = []
        for count in (1, threads):
            logprob, rank = np.zeros(1, np.float32), np.zeros(1, np.int32)
            ids, logprobs = np.zeros((1, 30), np.int32), np.zeros((1, 30), np.float32)
            report = {"logprob": logprob, "rank": rank, "top_ids": ids, "top_logprobs": logprobs}
            tokens = draw(
                team(level, count), x[s : s + 1], [row], num_logprobs=np.array([30], np.int32), **report
            )
            agree(x[s : s + 1], [row], tokens)
            reports.append([a.tolist() for a in report.values()])
        assert reports[0] == reports[1]


def test_tokens_are_counted() -> None:
    counts = np.zeros((2, 10), np.int32)
    first, second = (row.ctypes.data for row in counts)
    addresses = np.array([first, 0, second, first, first, second], np.uint64)
    cpu.count_tokens(addresses, np.array([3, 3, 9, 3, -1, 10], np.int32), 10)
    assert counts[0].tolist() == [0, 0, 0, 2] + [0] * 6 and counts[1].tolist() == [0] * 9 + [1]
    with pytest.raises(ValueError, match="counts has 1 rows where 2 are needed"):
        cpu.count_tokens(addresses[:1], np.zeros(2, np.int32), 10)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab", [5, 64, 3001])
def test_logprobs_are_of_the_raw_distribution(level: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    x = np.round(rng.normal(0, 4, (6, vocab)), 1).astype(np.float32)  # rounded: ties
    x[5, 1] = np.nan
    wanted = np.array([-1, 0, 1, 5, min(20, vocab + 3), 2], np.int32)
    row = {"temperature": 1.5, "seed": 3, "position": 2, "top_k": 3, "banned": [int(x[3].argmax())]}
    width = int(wanted.max())
    logprob, rank = np.full(6, 9.0, np.float32), np.full(6, 9, np.int32)
    ids, logprobs = np.full((6, width), -9, np.int32), np.full((6, width), 9.0, np.float32)
    tokens = draw(
        team(level),
        x,
        [row] * 6,
        num_logprobs=wanted,
        logprob=logprob,
        rank=rank,
        top_ids=ids,
        top_logprobs=logprobs,
    )
    agree(x, [row] * 6, tokens)
    assert rank[0] == 9 and logprob[0] == 9  # not asked for
    assert rank[5] == 0 and np.isnan(logprob[5]) and ids[5, :2].tolist() == [-1, -1]
    for s in range(1, 5):
        exact = x[s].astype(np.float64)
        exact -= exact.max() + math.log(np.exp(exact - exact.max()).sum())
        order, n = ranked(x[s]), int(wanted[s])
        k = min(n, vocab)
        assert rank[s] == 1 + order.index(tokens[s])
        assert logprob[s] == pytest.approx(exact[tokens[s]], abs=2e-6, rel=1e-6)
        assert ids[s].tolist() == order[:k] + [-1] * (n - k) + [-9] * (width - n)
        np.testing.assert_allclose(logprobs[s, :k], exact[order[:k]], rtol=1e-6, atol=2e-6)
        assert (logprobs[s, k:n] == -np.inf).all()


def test_a_large_vocabulary() -> None:
    vocab = 262_144
    rng = np.random.default_rng(4)
    x = rng.normal(0, 2, (2, vocab)).astype(np.float32)
    x[1] = 0.0  # all alike: every cut falls among ties
    rows = [{"temperature": 1.0, "top_k": 50, "seed": 8, "position": 1}, {"temperature": 1.0, "top_p": 0.5}]
    drawn = draw(
        team(LEVELS[-1]), np.repeat(x, 20, axis=0), [rows[i // 20] | {"position": i} for i in range(40)]
    )
    top = set(np.argsort(-x[0])[:50].tolist())
    assert set(drawn[:20].tolist()) <= top
    assert (drawn[20:] < vocab // 2).all() and len(set(drawn[20:].tolist())) > 15
    exact = x[0].astype(np.float64)
    one = np.zeros(1, np.int32)
    logprob = np.zeros(1, np.float32)
    cpu.sample(
        team(LEVELS[-1]),
        x.ctypes.data,
        vocab,
        one,
        num_logprobs=np.zeros(1, np.int32),
        logprob=logprob,
        rank=np.zeros(1, np.int32),
        top_ids=np.zeros((1, 0), np.int32),
        top_logprobs=np.zeros((1, 0), np.float32),
    )
    assert logprob[0] == pytest.approx(exact.max() - math.log(np.exp(exact).sum()), abs=2e-6)


def test_arrays_that_do_not_fit_are_refused() -> None:
    x, tokens, t = np.zeros((2, 8), np.float32), np.zeros(2, np.int32), team("portable")
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="temperature has 1 rows where 2 are needed"):
        cpu.sample(t, x.ctypes.data, 8, tokens, temperature=np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="ascend"):
        cpu.sample(t, x.ctypes.data, 8, tokens, banned_start=np.array([0, 2, 1], np.int32), banned=one)
    with pytest.raises(ValueError, match="num_logprobs needs"):
        cpu.sample(t, x.ctypes.data, 8, tokens, num_logprobs=tokens)
    with pytest.raises(ValueError, match="no logits"):
        cpu.sample(t, 0, 8, tokens)
    with pytest.raises(ValueError, match="no sampling"):
        cpu.sample_workspace(1, 0)
    cpu.sample(t, x.ctypes.data, 8, np.zeros(0, np.int32))
