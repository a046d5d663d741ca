"""What stands between the QKV projection and attention: per-head norms, rotary embedding, the cache write."""

import torch
import triton
import triton.language as tl

from .configs import get_config

__all__ = ["rope_kv"]


@triton.jit
def _to_e4m3(x):
    """The bits of float8_e4m3fn, rounded to even and saturated. In integers: Ampere has no such conversion,
    and Triton's interpreter rounds wrongly."""
    bits = tl.clamp(x, -448.0, 448.0).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 3 of 23 bits of mantissa, and 7 for 127 as the exponent of 1.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9, which is the last place of 2^14.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | (bits >> 31 << 7)).to(tl.uint8)


@triton.jit
def _store_halves(at, low, high, inside, HALF: tl.constexpr, E4M3: tl.constexpr):
    if E4M3:
        low, high = _to_e4m3(low), _to_e4m3(high)
    tl.store(at, low.to(at.dtype.element_ty), mask=inside)
    tl.store(at + HALF, high.to(at.dtype.element_ty), mask=inside)


@triton.jit
def rope_kv_kernel(
    qkv,
    cos_sin,
    k_cache,
    v_cache,
    q_weight,
    k_weight,
    k_scale,
    v_scale,
    positions,
    token_row,
    context_len,
    row_slot,
    block_table,
    table_stride,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    E4M3: tl.constexpr,
):
    """One program takes BLOCK_HEADS of the Q_HEADS + 2 KV_HEADS heads of one token.

    A head is held as its two halves, whose elements meet in the rotation. Each element is loaded and
    stored by the same thread, so that rotating in place needs no barrier.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS) & (column < HALF)
    is_q = head < Q_HEADS
    is_v = head >= Q_HEADS + KV_HEADS

    position = tl.load(positions + token)
    row = tl.load(token_row + token)
    visible = position < tl.load(context_len + row)
    slot = tl.load(row_slot + row).to(tl.int64)
    block = tl.load(block_table + slot * table_stride + position // BLOCK_SIZE, mask=visible, other=0)

    at = qkv + (token * HEADS + head) * HEAD_DIM + column
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(low * low + high * high, axis=1, keep_dims=True)
        scale = tl.where(is_v, 1.0, tl.rsqrt(square / HEAD_DIM + eps))
        for half in tl.static_range(2):
            of_q = tl.load(q_weight + half * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
            of_k = tl.load(k_weight + half * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
            gain = tl.where(is_v, 1.0, tl.where(is_q, of_q, of_k)) * scale
            if half == 0:
                low *= gain
            else:
                high *= gain
    angle = cos_sin + position.to(tl.int64) * HEAD_DIM + column
    cos = tl.where(is_v, 1.0, tl.load(angle, mask=column < HALF, other=0.0))
    sin = tl.where(is_v, 0.0, tl.load(angle + HALF, mask=column < HALF, other=0.0))
    low, high = low * cos - high * sin, high * cos + low * sin

    _store_halves(at, low, high, inside & is_q, HALF, False)
    is_kv = inside & (head >= Q_HEADS) & visible
    kv_head = tl.where(is_v, head - KV_HEADS, head) - Q_HEADS
    cached = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
    cached = cached * HEAD_DIM + column
    if SCALED:
        scale = tl.where(is_v, 1.0 / tl.load(v_scale), 1.0 / tl.load(k_scale))
        low, high = low * scale, high * scale
    _store_halves(k_cache + cached, low, high, is_kv & ~is_v, HALF, E4M3)
    _store_halves(v_cache + cached, low, high, is_kv & is_v, HALF, E4M3)


def rope_kv(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    token_row: torch.Tensor,
    context_len: torch.Tensor,
    row_slot: torch.Tensor,
    block_table: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Norms and rotates q and k, writes q back into `qkv`, and k and v into the cache.

    `qkv` [T, (Hq + 2 Hk) D] contiguous; `cos_sin` float32 [positions, D], D/2 cosines and then D/2 sines;
    caches [blocks, Hk, block size, D] contiguous, of a float type or float8_e4m3fn. int32: `positions`
    and `token_row` [T], `context_len` and `row_slot` [R], `block_table` [slots, stride]. T is the length
    of `positions`. A token at or beyond its row's context length is padding: it writes no k and v.

    `q_weight`, `k_weight` [D]: weights of a norm over each head's D elements; both or neither.
    `k_scale`, `v_scale` float32 [1]: the cache holds k / k_scale and v / v_scale; both or neither.
    """
    kv_heads, block_size, head_dim = k_cache.shape[1:]
    heads = qkv.shape[1] // head_dim
    e4m3 = k_cache.dtype == torch.float8_e4m3fn
    if e4m3:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    config = get_config("rope_kv", qkv.device)
    block_heads = min(config.block["BLOCK_HEADS"], triton.next_power_of_2(heads))
    rope_kv_kernel[(positions.shape[0], triton.cdiv(heads, block_heads))](
        qkv,
        cos_sin,
        k_cache,
        v_cache,
        q_weight,
        k_weight,
        k_scale,
        v_scale,
        positions,
        token_row,
        context_len,
        row_slot,
        block_table,
        block_table.stride(0),
        eps,
        Q_HEADS=heads - 2 * kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        NORM=q_weight is not None,
        SCALED=k_scale is not None,
        E4M3=e4m3,
        **config.options,
    )
