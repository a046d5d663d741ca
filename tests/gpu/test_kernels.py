"""Kernels on a GPU in bfloat16, which the interpreter cannot do, against float64 references in torch."""

from typing import Any

import pytest
import torch

from asyncengine.kernels.activation import gated
from asyncengine.kernels.paged_attention import AttentionWorkspace, paged_attention
from asyncengine.kernels.rms_norm import add_rms_norm, rms_norm
from asyncengine.kernels.rope_kv import rope_kv
from asyncengine.kernels.sampler import Sampled, SamplerWorkspace, sample
from asyncengine.kernels.slot_params import RECORD_WORDS, pack_record

from ..kernels import sampler_model

DTYPE = torch.bfloat16
PROGRAMS = None
EPS = 1e-6


def close(out: torch.Tensor, expected: torch.Tensor, *, roundings: float = 1.0, atol: float = 1e-5) -> None:
    """To `roundings` half units in the last place of what is stored."""
    rtol = roundings * torch.finfo(out.dtype).eps / 2 + 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("width", [1024, 4096, 5120])
def test_rms_norm(device: torch.device, width: int) -> None:
    torch.manual_seed(width)
    x, residual = (torch.randn(37, width, device=device).to(DTYPE) for _ in range(2))
    weight = torch.rand(width, device=device) + 0.5

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return rows / torch.sqrt((rows * rows).mean(1, keepdim=True) + EPS) * weight.double()

    out = torch.empty_like(x)
    rms_norm(out, x, weight, EPS)
    close(out, norm(x.double()))
    total = (residual.double() + x.double()).to(DTYPE)
    add_rms_norm(out, residual, x, weight, EPS)
    close(residual, total.double())
    close(out, norm(residual.double()))


def test_gated(device: torch.device) -> None:
    x = (3 * torch.randn(50, 2 * 3000, device=device)).to(DTYPE)
    out = torch.empty(50, 3000, dtype=DTYPE, device=device)
    gated(out, x)
    gate, up = x.double().chunk(2, dim=1)
    close(out, gate * torch.sigmoid(gate) * up)


class Batch:
    """Rows of (query tokens, context length), their keys and values on blocks in disorder; a row of context 0
    is padding. What no row may see is NaN."""

    def __init__(
        self, rows: list[tuple[int, int]], device: torch.device, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        random = torch.Generator().manual_seed(len(rows))
        block_size = 64 if head_dim >= 64 else 16
        self.rows, self.heads, self.kv_heads, self.head_dim = rows, heads, kv_heads, head_dim
        stride = -(-max(context for _, context in rows) // block_size)
        order = torch.randperm(len(rows) * stride, generator=random)
        tokens = sum(count for count, _ in rows)

        def ints(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device=device)

        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=random)
        self.qkv = self.qkv.to(device, DTYPE)
        cache = torch.full((len(order), kv_heads, block_size, head_dim), float("nan"), dtype=DTYPE)
        self.caches = [cache.clone().to(device) for _ in range(2)]
        starts = [0]
        for count, _ in rows:
            starts.append(starts[-1] + count)
        self.arrays = dict(
            query_start=ints(starts),
            context_len=ints([context for _, context in rows]),
            row_slot=ints(range(len(rows))),
            block_table=ints(order.reshape(len(rows), stride)),
        )
        self.known: list[list[torch.Tensor]] = [[], []]
        for which in range(2):
            for row, (_, context) in enumerate(rows):
                values = torch.randn(context, kv_heads, head_dim, generator=random).to(device, DTYPE)
                for at in range(0, context, block_size):
                    block = self.arrays["block_table"][row, at // block_size]
                    part = values[at : at + block_size].transpose(0, 1)
                    self.caches[which][block, :, : part.shape[1]] = part
                self.known[which].append(values.double())

    def launch(self, window: int) -> torch.Tensor:
        rows, device = self.rows, self.qkv.device
        out = torch.full((len(self.qkv), self.heads * self.head_dim), 7.0, dtype=DTYPE, device=device)
        workspace = AttentionWorkspace.allocate(self.head_dim, device, PROGRAMS)
        decode = next((i for i, (count, _) in enumerate(rows) if count > 1), len(rows))
        for part in (range(decode), range(decode, len(rows))):
            for _ in range(2 if part else 0):  # the second one finds the counters as it needs them
                paged_attention(
                    self.qkv,
                    *self.caches,
                    out=out,
                    workspace=workspace,
                    rows=part,
                    max_query=max(rows[i][0] for i in part),
                    scale=self.head_dim**-0.5,
                    window=window,
                    **self.arrays,
                )
        return out

    def reference(self, window: int) -> torch.Tensor:
        queries = self.qkv[:, : self.heads * self.head_dim].double().reshape(-1, self.heads, self.head_dim)
        parts, first = [], 0
        for row, (count, context) in enumerate(self.rows):
            q = queries[first : first + count]
            first += count
            if context == 0:
                parts.append(torch.zeros_like(q).flatten(1))
                continue
            keys, values = (k[row].repeat_interleave(self.heads // self.kv_heads, dim=1) for k in self.known)
            scores = torch.einsum("qhd,khd->hqk", q, keys) * self.head_dim**-0.5
            at = torch.arange(context - count, context, device=q.device)[:, None]
            key = torch.arange(context, device=q.device)[None]
            hidden = (key > at) | ((key <= at - window) if window else (key > context))
            scores = scores.masked_fill(hidden, float("-inf"))
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1))
        return torch.cat(parts)


ROWS = {
    "decode": [(1, n) for n in (1, 63, 64, 65, 1000, 3, 2500, 128)] + [(1, 0)],
    "prefill": [(70, 70), (200, 900), (5, 1300), (513, 513)],
    "both": [(1, 700), (1, 9), (33, 33), (128, 400)],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (8, 8, 96), (16, 1, 256)]
)
@pytest.mark.parametrize("window", [0, 100])
def test_attention(
    device: torch.device, rows: str, heads: int, kv_heads: int, head_dim: int, window: int
) -> None:
    batch = Batch(ROWS[rows], device, heads, kv_heads, head_dim)
    # Weights are rounded to bfloat16 before they meet the values, whose magnitude is 1.
    close(batch.launch(window), batch.reference(window), roundings=2, atol=6e-3)


def test_rope_kv(device: torch.device) -> None:
    heads, kv_heads, head_dim, block_size = 6, 2, 128, 64
    torch.manual_seed(1)
    positions = torch.tensor([5, 63, 64, 65, 66, 0, 0])
    token_row = torch.tensor([0, 1, 1, 1, 1, 2, 3])
    context_len, row_slot = torch.tensor([6, 67, 1, 0]), torch.tensor([2, 0, 1, 0])
    table = torch.randperm(6).reshape(3, 2)
    angles = torch.arange(100)[:, None] * 0.1 ** (torch.arange(64) / 64)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device)
    qkv = torch.randn(7, (heads + 2 * kv_heads) * head_dim).to(device, DTYPE)
    q_weight, k_weight = (torch.rand(head_dim, device=device) + 0.5 for _ in range(2))
    caches = [torch.full((6, kv_heads, block_size, head_dim), 7.0).to(device, DTYPE) for _ in range(2)]

    x = qkv.double().reshape(7, -1, head_dim)
    q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
    angle = cos_sin.double()[positions.to(device)][:, None]
    turned = []
    for part, weight in ((q, q_weight), (k, k_weight)):
        normed = part / torch.sqrt((part * part).mean(2, keepdim=True) + EPS) * weight.double()
        low, high = normed.chunk(2, dim=2)
        cos, sin = angle.chunk(2, dim=2)
        turned.append(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2))
    expected = [cache.double() for cache in caches]
    for t in range(6):  # the last token is padding
        block = table[row_slot[token_row[t]], positions[t] // block_size]
        expected[0][block, :, positions[t] % block_size] = turned[1][t]
        expected[1][block, :, positions[t] % block_size] = v[t]

    arrays = [a.to(device, torch.int32) for a in (positions, token_row, context_len, row_slot, table)]
    rope_kv(qkv, cos_sin, *caches, *arrays, q_weight=q_weight, k_weight=k_weight, eps=EPS)
    close(qkv.reshape(7, -1, head_dim)[:, :heads], turned[0], atol=1e-4)
    for cache, values in zip(caches, expected, strict=True):
        close(cache, values, atol=1e-4)


FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05, "top_k": 300, "top_p": 0.95},
]


def test_sampler(device: torch.device) -> None:
    rows, vocab, gap = 40, 50_257, 1e-4
    logits = (3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3))).to(device, DTYPE)
    logits[7, 123] = float("nan")
    fields = [{"seed": 1000 + row, **FIELDS[row % len(FIELDS)]} for row in range(rows)]
    records = b"".join(pack_record(**field) for field in fields)
    params = torch.frombuffer(bytearray(records), dtype=torch.int32).reshape(rows, RECORD_WORDS).to(device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    last = torch.full((rows,), -9, dtype=torch.int32, device=device)
    out = Sampled.allocate(rows, 0, device)
    workspace = SamplerWorkspace.allocate(rows, vocab, device)
    sample(logits, params, slots, slots + 50, last, out, workspace)
    assert torch.equal(last, out.tokens)
    for row, token in enumerate(out.tokens.tolist()):
        x = logits[row].float().cpu().numpy()
        expected, margin = sampler_model.drawn(x, fields[row] | {"position": 50 + row})
        assert token == expected or margin < gap, (row, fields[row])
    assert out.tokens[7] == -1
