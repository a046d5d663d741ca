"""Attention over a paged cache of keys and values."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton

from .attention_decode import decode_kernel
from .attention_prefill import prefill_kernel
from .attention_tile import Spec
from .configs import Config, get_config

__all__ = ["AttentionWorkspace", "Launch", "launch_of", "paged_attention"]

DECODE_LINES = 32
"""Query tokens times query heads per KV head up to which a row counts as decode: two tiles of 16 or one
of 32."""


class AttentionWorkspace(NamedTuple):
    """Scratch memory of decode launches, one at a time; `counters` are zero between launches."""

    partial: torch.Tensor
    """float32 [P, 2, DECODE_LINES * D]: outputs of which one of P programs saw a part, D a power of two."""
    partial_sums: torch.Tensor
    """float32 [P, 2, 2 * DECODE_LINES]: their maxima and sums."""
    counters: torch.Tensor
    """int32 [P]"""

    @classmethod
    def allocate(
        cls, head_dim: int, device: torch.device, programs: int | None = None
    ) -> "AttentionWorkspace":
        """For heads of up to `head_dim` elements. `programs` is the grid of decode launches; if None, as many
        as the GPU runs at once."""
        block_d = triton.next_power_of_2(head_dim)
        if programs is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            programs = processors * get_config(_config_name("decode", block_d), device).block["PROGRAMS"]
        return cls(
            torch.empty((programs, 2, DECODE_LINES * block_d), dtype=torch.float32, device=device),
            torch.empty((programs, 2, 2 * DECODE_LINES), dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
        )


def paged_attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    row_slot: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
    *,
    rows: range,
    max_query: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Causal attention of the tokens of `rows` over their paged keys and values, into `out`.

    `qkv` [T, (Hq + 2 Hk) D], of which the first Hq heads are read; `out` [T, Hq D]; lines contiguous.
    Caches [blocks, Hk, block size, D] of qkv's type or float8_e4m3fn, contiguous but for the distance of
    blocks; block size a power of two >= 16, D <= 256. int32: `query_start` [R + 1], `context_len` and
    `row_slot` [R], `block_table` [slots, stride]. Row r's tokens are query_start[r] up to
    query_start[r + 1], the last of its context_len[r] visible ones; its blocks are
    block_table[row_slot[r]]. A row of context length 0 is padding: its tokens' output is zero.

    `rows`, at least one, are those of this launch. `max_query` is no less than any one's number of tokens;
    it chooses the kernel, so a batch of both kinds is best split in two launches. The grid depends on
    these, T and the workspace alone: with few tokens per row one captured launch serves all lengths.

    Scores are `scale` * q.k; with `soft_cap` c > 0, c tanh(score / c); with `alibi_slopes` float [Hq], plus
    slope * (key's position - token's). With `window` > 0 a token sees itself and the window - 1 before it.
    `sinks` float [Hq] are scores of one more key each, whose value is zero. `k_scale`, `v_scale` float32 [1]:
    the cache holds k / k_scale and v / v_scale; both or neither.
    """
    kv_heads, block_size, head_dim = k_cache.shape[1:]
    group = out.shape[1] // head_dim // kv_heads
    e4m3 = k_cache.dtype == torch.float8_e4m3fn
    _check(qkv, k_cache, v_cache, out, scale)
    launch = launch_of(
        partial(get_config, device=qkv.device),
        max_query,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        ALIBI=alibi_slopes is not None,
        SINKS=sinks is not None,
        SCALED=k_scale is not None,
        E4M3=e4m3,
        wide=k_cache.element_size() == 4,
    )
    if e4m3 and not _converts_e4m3(qkv.device):
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    arguments = (
        qkv,
        qkv.stride(0),
        out,
        out.stride(0),
        k_cache,
        v_cache,
        k_cache.stride(0),
        v_cache.stride(0),
        query_start,
        context_len,
        row_slot,
        block_table,
        block_table.stride(0),
        rows.start,
        len(rows),
        scale,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
    )
    if launch.decode:
        decode_kernel[workspace.counters.shape](*arguments, *workspace, S=launch.spec, **launch.options)
    else:
        tiles = min(out.shape[0], len(rows) * max_query) * group // launch.spec.BLOCK_M + len(rows)
        prefill_kernel[(tiles, kv_heads)](*arguments, S=launch.spec, **launch.options)


class Launch(NamedTuple):
    """How a kernel is compiled; `decode` says which."""

    decode: bool
    spec: Spec
    options: dict[str, int]


def launch_of(
    config_of: Callable[[str], Config],
    max_query: int,
    *,
    HEAD_DIM: int,
    GROUP: int,
    wide: bool = False,
    **constants: Any,
) -> Launch:
    """The launch for rows of up to `max_query` tokens; `wide` for a cache of 4-byte elements."""
    block_d = max(16, triton.next_power_of_2(HEAD_DIM))
    lines = max_query * GROUP
    decode = max_query == 1 or lines <= DECODE_LINES
    config = config_of(_config_name("decode" if decode else "prefill", block_d))
    block, options = config.block, config.options
    if decode:
        block_m = 16 if lines <= 16 else block["MAX_M"]
    else:
        block_m = block["BLOCK_M"]
        if lines <= block_m // 2 or wide:
            block_m, options = block_m // 2, options | {"num_warps": block["SHORT_WARPS"]}
    if wide:
        options = options | {"num_stages": 2}
    spec = Spec(
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=block_d,
        GROUP=GROUP,
        BLOCK_M=block_m,
        BLOCK_N=block["BLOCK_N"] // (2 if wide else 1),
        MIN_TILES=block["MIN_TILES"] if decode else 0,
        **constants,
    )
    return Launch(decode, spec, options)


def _config_name(kind: str, block_d: int) -> str:
    return f"attention_{kind}_{max(64, block_d)}"


def _check(
    qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, scale: float
) -> None:
    _, kv_heads, block_size, head_dim = k_cache.shape
    q_heads = out.shape[1] // head_dim
    if head_dim > 256:
        raise ValueError(f"attention heads have {head_dim} elements; the kernels take up to 256")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}; the kernels take powers of two from 16 on")
    if q_heads % kv_heads or qkv.shape[1] != (q_heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"{q_heads} query and {kv_heads} KV heads of {head_dim} do not fit qkv {qkv.shape}")
    if k_cache.dtype not in (qkv.dtype, torch.float8_e4m3fn) or v_cache.dtype != k_cache.dtype:
        raise TypeError(f"the cache is {k_cache.dtype} and qkv {qkv.dtype}; use one type, or float8_e4m3fn")
    contiguous = (block_size * head_dim, head_dim, 1)
    if k_cache.stride()[1:] != contiguous or v_cache.stride()[1:] != contiguous:
        raise ValueError(f"blocks must be contiguous; their strides are {k_cache.stride()}")
    if scale <= 0.0:
        raise ValueError(f"scale is {scale}; it must be positive")


@cache
def _converts_e4m3(device: torch.device) -> bool:
    """Whether the GPU has instructions for it; Triton refuses the type where not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
