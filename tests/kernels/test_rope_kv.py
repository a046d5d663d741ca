"""Norm, rotation and cache write against float64, over a block table in disorder."""

from typing import Any

import pytest
import torch

from asyncengine.kernels.rope_kv import rope_kv

EPS = 1e-6
POSITIONS = 40


def table(head_dim: int) -> torch.Tensor:
    angles = torch.arange(POSITIONS)[:, None] * 0.1 ** (torch.arange(head_dim // 2) / (head_dim / 2))
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def batch(block_size: int) -> dict[str, torch.Tensor]:
    """Rows of 1, 5 and 2 tokens in slots 2, 0 and 1, and one of padding."""
    positions = [9, 14, 15, 16, 17, 18, 0, 1, 0]
    token_row = [0, 1, 1, 1, 1, 1, 2, 2, 3]
    stride = -(-POSITIONS // block_size) + 1
    blocks = torch.randperm(3 * stride, generator=torch.Generator().manual_seed(0))
    tensors = {
        "positions": positions,
        "token_row": token_row,
        "context_len": [10, 19, 2, 0],
        "row_slot": [2, 0, 1, 0],
        "block_table": (blocks.reshape(3, stride) + 1).tolist(),
    }
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in tensors.items()}


def run(
    head_dim: int,
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    norm: bool = False,
    scales: tuple[float, float] | None = None,
    spread: float = 1.0,
) -> None:
    torch.manual_seed(head_dim)
    step, cos_sin = batch(block_size), table(head_dim)
    tokens, heads = len(step["positions"]), q_heads + 2 * kv_heads
    qkv = (spread * torch.randn(tokens, heads * head_dim)).to(dtype)
    shape = (step["block_table"].numel() + 1, kv_heads, block_size, head_dim)
    cache_dtype = cache_dtype or dtype
    k_cache, v_cache = (torch.full(shape, 7.0).to(cache_dtype) for _ in range(2))
    options: dict[str, Any] = {}
    if norm:
        options |= {"q_weight": torch.randn(head_dim), "k_weight": torch.randn(head_dim), "eps": EPS}
    if scales:
        options |= {"k_scale": torch.tensor([scales[0]]), "v_scale": torch.tensor([scales[1]])}

    x = qkv.double().reshape(tokens, heads, head_dim).clone()
    q, k, v = x.split((q_heads, kv_heads, kv_heads), dim=1)
    if norm:
        for part, weight in ((q, options["q_weight"]), (k, options["k_weight"])):
            part /= torch.sqrt((part * part).mean(dim=2, keepdim=True) + EPS)
            part *= weight.double()
    half = head_dim // 2
    cos, sin = cos_sin.double()[step["positions"].long(), None].split(half, dim=2)
    for part in (q, k):
        low, high = part[..., :half].clone(), part[..., half:].clone()
        part[..., :half], part[..., half:] = low * cos - high * sin, high * cos + low * sin
    expected_k, expected_v = k_cache.double(), v_cache.double()
    for t in range(tokens):
        position, row = int(step["positions"][t]), int(step["token_row"][t])
        if position >= step["context_len"][row]:
            continue
        block = int(step["block_table"][step["row_slot"][row], position // block_size])
        expected_k[block, :, position % block_size] = k[t] / (scales or (1, 1))[0]
        expected_v[block, :, position % block_size] = v[t] / (scales or (1, 1))[1]

    before = qkv.clone()
    rope_kv(qkv, cos_sin, k_cache, v_cache, **step, **options)
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    got = qkv.reshape(tokens, heads, head_dim)
    torch.testing.assert_close(got[:, :q_heads].double(), q, **loose)
    assert torch.equal(got[:, q_heads:], before.reshape(got.shape)[:, q_heads:])
    if cache_dtype == torch.float8_e4m3fn:
        assert not k_cache.double().isnan().any() and not v_cache.double().isnan().any()
        expected_k, expected_v = (c.clamp(-448, 448) for c in (expected_k, expected_v))
        loose = {"rtol": 2**-4 + 1e-5, "atol": 2**-10 + 1e-5}  # half a unit of 3 bits, or of the subnormals
    torch.testing.assert_close(k_cache.double(), expected_k, **loose)
    torch.testing.assert_close(v_cache.double(), expected_v, **loose)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_sizes(head_dim: int, norm: bool) -> None:
    run(head_dim, norm=norm)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (9, 3), (8, 1)])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_heads_and_blocks(q_heads: int, kv_heads: int, block_size: int) -> None:
    run(32, q_heads=q_heads, kv_heads=kv_heads, block_size=block_size)


def test_half_precision() -> None:
    run(64, dtype=torch.float16, norm=True)


def test_a_cache_of_8_bits() -> None:
    run(64, cache_dtype=torch.float8_e4m3fn, scales=(0.25, 2.0))
    # Larger than the format holds: saturated, not NaN.
    run(64, cache_dtype=torch.float8_e4m3fn, scales=(0.01, 0.02), spread=10.0)


def test_every_number_of_8_bits_and_what_lies_between() -> None:
    """v is written as it is: exact numbers and ties between them, against torch's own conversion."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([0.0])))
    x = torch.cat((x, -x)).reshape(1, 1, -1)
    x = torch.cat((x, torch.nextafter(x, torch.tensor(torch.inf)), torch.nextafter(x, -x)), dim=1)
    width = x.shape[2]
    qkv = torch.cat((torch.zeros(1, 2, width), x[:, :1]), dim=1).reshape(1, -1)
    for i in range(x.shape[1]):
        qkv[0, 2 * width :] = x[0, i]
        k_cache = torch.zeros((1, 1, 16, width), dtype=torch.float8_e4m3fn)
        v_cache = k_cache.clone()
        ones, zeros = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        cos_sin = torch.zeros(1, width)
        rope_kv(qkv, cos_sin, k_cache, v_cache, zeros, zeros, ones, zeros, zeros[None])
        expected = x[0, i].clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(v_cache[0, 0, 0].float(), expected.float())


def test_no_block_is_touched_beyond_the_context() -> None:
    """A padding row's slot and block are never followed, whatever they hold."""
    step = batch(16)
    step["row_slot"][3] = 2
    step["block_table"][2, 0] = 1 << 30
    step["positions"][0] = 20
    step["context_len"][0] = 21
    qkv, cache = torch.randn(9, 8 * 16), torch.zeros(step["block_table"].numel() + 1, 2, 16, 16)
    rope_kv(qkv, table(16), cache, cache.clone(), **step)
