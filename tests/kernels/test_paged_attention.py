"""Attention against float64 over a block table in disorder, whose unused elements are NaN."""

import math
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from asyncengine.kernels.configs import Config
from asyncengine.kernels.paged_attention import AttentionWorkspace, paged_attention

HEAD_DIM = 16
CPU = torch.device("cpu")


class Batch:
    """Rows of (query tokens, context length), in permuted slots and blocks. What the table holds beyond a
    context must not be followed."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        q_heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = HEAD_DIM,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        scales: tuple[float, float] | None = None,
    ) -> None:
        random = torch.Generator().manual_seed(7)
        self.rows, self.q_heads, self.kv_heads, self.head_dim = rows, q_heads, kv_heads, head_dim
        queries, contexts = [q for q, _ in rows], [c for _, c in rows]
        stride = -(-max(contexts) // block_size) + 1
        slots = torch.randperm(len(rows), generator=random)
        blocks = torch.randperm(len(rows) * stride, generator=random) + 1
        table = blocks.reshape(len(rows), stride).int()
        slot = slots.tolist()
        for r, context in enumerate(contexts):
            table[slot[r], -(-context // block_size) :] = 1 << 30
        self.step = {
            "query_start": torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32),
            "context_len": torch.tensor(contexts, dtype=torch.int32),
            "row_slot": slots.int(),
            "block_table": table,
        }
        width = (q_heads + 2 * kv_heads) * head_dim
        self.qkv = torch.randn(sum(queries), width, generator=random).to(dtype)
        # Keys and values of one layer of two: blocks lie apart.
        shape = (len(blocks) + 1, 2, 2, kv_heads, block_size, head_dim)
        caches = torch.full(shape, math.nan).to(cache_dtype or dtype)
        self.k_cache, self.v_cache = caches[:, 1, 0], caches[:, 1, 1]
        self.scales = scales or (1.0, 1.0)
        self.options: dict[str, Any] = {"scale": head_dim**-0.5}
        if scales:
            self.options |= {"k_scale": torch.tensor([scales[0]]), "v_scale": torch.tensor([scales[1]])}
        self.keys, self.values = [], []
        for r, context in enumerate(contexts):
            kept = []
            for cache, scale in zip((self.k_cache, self.v_cache), self.scales, strict=True):
                x = torch.randn(context, kv_heads, head_dim, generator=random).to(cache.dtype)
                for i in range(context):
                    cache[table[slot[r], i // block_size], :, i % block_size] = x[i]
                kept.append(x.double() * scale)
            self.keys.append(kept[0])
            self.values.append(kept[1])

    def expected(self) -> torch.Tensor:
        """[T, Hq D] float64, row by row and head by head."""
        options, results = self.options, []
        group = self.q_heads // self.kv_heads
        q = self.qkv.double().reshape(len(self.qkv), -1, self.head_dim)
        first = 0
        for (query, context), k, v in zip(self.rows, self.keys, self.values, strict=True):
            out = torch.zeros(query, self.q_heads, self.head_dim, dtype=torch.float64)
            position = torch.arange(context - query, context)[:, None]
            key = torch.arange(context)[None, :]
            visible = key <= position
            if options.get("window"):
                visible &= position - key < options["window"]
            for head in range(self.q_heads if context else 0):
                s = q[first : first + query, head] @ k[:, head // group].T * options["scale"]
                if options.get("soft_cap"):
                    s = options["soft_cap"] * torch.tanh(s / options["soft_cap"])
                if "alibi_slopes" in options:
                    s += options["alibi_slopes"][head].double() * (key - position)
                s = s.masked_fill(~visible, -math.inf)
                if "sinks" in options:
                    sink = options["sinks"][head].double().expand(query, 1)
                    s = torch.cat((s, sink), dim=1)
                out[:, head] = s.softmax(dim=1)[:, :context] @ v[:, head // group]
            results.append(out.reshape(query, -1))
            first += query
        return torch.cat(results)

    def launch(self, out: torch.Tensor, workspace: AttentionWorkspace, rows: range | None = None) -> None:
        rows = range(len(self.rows)) if rows is None else rows
        paged_attention(
            self.qkv,
            self.k_cache,
            self.v_cache,
            **self.step,
            out=out,
            workspace=workspace,
            rows=rows,
            max_query=max(self.rows[r][0] for r in rows),
            **self.options,
        )

    def check(self, *, programs: int = 4, times: int = 1, splits: list[range] | None = None) -> None:
        workspace = AttentionWorkspace.allocate(self.head_dim, CPU, programs)
        expected = self.expected()
        loose = 2e-3 if self.qkv.dtype == torch.float16 or self.scales != (1.0, 1.0) else 2e-5
        for _ in range(times):
            out = torch.full(expected.shape, math.nan, dtype=self.qkv.dtype)
            for rows in splits or [range(len(self.rows))]:
                self.launch(out, workspace, rows)
            torch.testing.assert_close(out.double(), expected, rtol=loose, atol=loose)
            assert not workspace.counters.any()


DECODE = [(1, 33), (1, 1), (1, 0), (1, 64), (1, 95)]
VERIFY = [(3, 40), (4, 4), (1, 70), (2, 0), (2, 17)]
PREFILL = [(37, 90), (2, 0), (5, 33), (20, 20)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a context of less than 100 has many of."""

    def config(kernel: str, device: torch.device) -> Config:
        block = {"MAX_M": 32, "MIN_TILES": 1, "BLOCK_M": 32, "SHORT_WARPS": 4}
        return Config(block | {"BLOCK_N": 32}, {"num_warps": 4})

    monkeypatch.setattr("asyncengine.kernels.paged_attention.get_config", config)


@pytest.mark.parametrize("programs", [1, 3, 7, 40])
def test_decode_however_it_is_split(programs: int) -> None:
    Batch(DECODE).check(programs=programs, times=2)


@pytest.mark.parametrize("seed", [0, 1])
def test_whichever_program_arrives_last(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other: here in disorder."""
    programs = 24
    order = torch.randperm(programs, generator=torch.Generator().manual_seed(seed)).tolist()
    set_grid_index = interpreter.interpreter_builder.set_grid_idx
    seen = []

    def disordered(x: int, y: int, z: int) -> None:
        seen.append(order[x])
        set_grid_index(order[x], y, z)

    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", disordered)
    Batch([(1, 95), (1, 20), (1, 80)]).check(programs=programs, times=2)
    assert seen == 2 * order


@pytest.mark.parametrize("programs", [2, 40])
def test_several_tokens_per_row(programs: int) -> None:
    Batch(VERIFY, q_heads=3, kv_heads=1).check(programs=programs, times=2)
    Batch(VERIFY, q_heads=8, kv_heads=1, block_size=32).check(programs=programs)


def test_prefill() -> None:
    Batch(PREFILL).check()


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (3, 1), (16, 2), (40, 1)])
def test_query_heads_per_kv_head(q_heads: int, kv_heads: int) -> None:
    Batch([(1, 40), (1, 9)], q_heads=q_heads, kv_heads=kv_heads).check(programs=3)
    Batch([(11, 40), (33, 33)], q_heads=q_heads, kv_heads=kv_heads).check()


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_head_and_block_sizes(head_dim: int, block_size: int) -> None:
    shape = {"q_heads": 2, "kv_heads": 1, "head_dim": head_dim, "block_size": block_size}
    Batch([(1, 70), (1, 15)], **shape).check()
    Batch([(35, 70)], **shape).check()


def test_a_mixed_batch_in_two_launches() -> None:
    batch = Batch([(1, 50), (1, 7), (1, 0), (25, 60), (30, 30)], q_heads=2, kv_heads=1)
    batch.check(splits=[range(3), range(3, 5)])


def test_more_rows_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("decode", "prefill"):
        monkeypatch.setattr(f"asyncengine.kernels.attention_{kernel}.ROWS", 4)
    shape = {"q_heads": 2, "kv_heads": 1}
    Batch([(1, 9 * i % 50) for i in range(13)], **shape).check(programs=6)
    Batch([(7 * i % 40 + 1, 50) for i in range(9)], **shape).check()


def options_of(variant: str, q_heads: int) -> dict[str, Any]:
    per_head = torch.linspace(-1.5, 2.5, q_heads)
    return {
        "window of one tile": {"window": 32},
        "window in a tile": {"window": 5},
        "window and soft cap": {"window": 41, "soft_cap": 0.5},
        "soft cap of large scores": {"soft_cap": 30.0, "scale": 1e4},
        "large scores": {"scale": 1e4},
        "sinks": {"sinks": 4 * per_head},
        "sinks and window": {"sinks": 4 * per_head, "window": 9},
        "alibi": {"alibi_slopes": 2.0 ** -(per_head + 3)},
        "alibi and soft cap": {"alibi_slopes": 2.0 ** -(per_head + 3), "soft_cap": 2.0},
    }[variant]


@pytest.mark.parametrize(
    "variant",
    [
        "window of one tile",
        "window in a tile",
        "window and soft cap",
        "soft cap of large scores",
        "large scores",
        "sinks",
        "sinks and window",
        "alibi",
        "alibi and soft cap",
    ],
)
@pytest.mark.parametrize("rows", [[(1, 75), (2, 33), (1, 0)], [(40, 75), (2, 0)]], ids=["decode", "prefill"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_variants(rows: list[tuple[int, int]], variant: str) -> None:
    batch = Batch(rows, q_heads=2, kv_heads=1)
    batch.options |= options_of(variant, 2)
    batch.check(programs=3)


@pytest.mark.parametrize("rows", [[(1, 75), (1, 16)], [(40, 75)]], ids=["decode", "prefill"])
def test_half_precision(rows: list[tuple[int, int]]) -> None:
    Batch(rows, dtype=torch.float16, head_dim=64, block_size=32).check()


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("rows", [[(1, 75), (1, 16)], [(40, 75)]], ids=["decode", "prefill"])
def test_a_cache_of_8_bits(
    rows: list[tuple[int, int]], converts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncengine.kernels.paged_attention._converts_e4m3", lambda device: converts)
    cache = {"cache_dtype": torch.float8_e4m3fn, "q_heads": 2, "kv_heads": 1}
    Batch(rows, **cache, scales=(0.25, 2.0)).check(programs=3)


def test_what_does_not_fit_is_refused() -> None:
    workspace, out = AttentionWorkspace.allocate(HEAD_DIM, CPU, 2), torch.empty(1, 4 * HEAD_DIM)
    batch = Batch([(1, 5)])
    batch.options["scale"] = 0.0
    with pytest.raises(ValueError, match="scale"):
        batch.launch(out, workspace)
    with pytest.raises(TypeError, match="float16"):
        Batch([(1, 5)], cache_dtype=torch.float16).launch(out, workspace)
    with pytest.raises(ValueError, match="block_size"):
        Batch([(1, 5)], block_size=24).launch(out, workspace)
    with pytest.raises(ValueError, match="query"):
        Batch([(1, 5)], q_heads=3, kv_heads=1).launch(out, workspace)
