"""Draws one token per row of logits: the distribution and the noise are those of `_fast/cpu/sample.h`.

Nothing is sorted and nothing waits for the host. A first kernel reads the logits once, in tiles of the
vocabulary: it draws what needs no filter, and leaves behind the maxima of tiles and of groups of 64 ids.
A second one, a program per row, joins the tiles. For top-k, top-p and min-p it derives from the maxima
a value that nothing kept lies below, gathers the few ids above it, and searches the exact cut among
them. A row whose ids do not fit the list is read again and again instead: slower, with the same result.

Sums are taken tile by tile in one order, so a row's token does not depend on the rows beside it.
"""

from typing import NamedTuple

import torch
import triton

from .configs import get_config
from .sampler_pick import pick_kernel
from .sampler_scan import FIELDS, GROUP, scan_kernel

__all__ = ["Sampled", "SamplerWorkspace", "sample"]


class Sampled(NamedTuple):
    """What the sampler gives for S rows; the last four where a slot asks for log-probabilities.

    They are of the raw logits; a row that failed has token -1, logprob NaN and rank 0.
    """

    tokens: torch.Tensor
    """int32 [S]"""
    logprob: torch.Tensor
    """float32 [S], of the token"""
    rank: torch.Tensor
    """int32 [S], of the token, from 1"""
    top_ids: torch.Tensor
    """int32 [S, N], largest first; of a row that asks for n <= N, the first n are written."""
    top_logprobs: torch.Tensor
    """float32 [S, N]"""

    @classmethod
    def allocate(cls, rows: int, logprobs: int, device: torch.device) -> "Sampled":
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(ints(rows), floats(rows), ints(rows), ints(rows, logprobs), floats(rows, logprobs))


class SamplerWorkspace(NamedTuple):
    """Scratch memory for up to S rows, without meaning between calls."""

    tiles: torch.Tensor
    """float32 [S, tiles, FIELDS]"""
    maxima: torch.Tensor
    """float32 [S, 2, groups]: of raw logits, and of what is drawn from"""
    listed: torch.Tensor
    """float32 [S, room], candidates' values"""
    listed_ids: torch.Tensor
    """int32 [S, room]"""

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device, room: int = 16384) -> "SamplerWorkspace":
        block = get_config("sampler_scan", device).block["BLOCK"]
        tiles = triton.cdiv(vocab, block)
        room = min(room, tiles * block)
        return cls(
            torch.empty((rows, tiles, FIELDS.value), dtype=torch.float32, device=device),
            torch.empty((rows, 2, tiles * block // GROUP.value), dtype=torch.float32, device=device),
            torch.empty((rows, room), dtype=torch.float32, device=device),
            torch.empty((rows, room), dtype=torch.int32, device=device),
        )


def sample(
    logits: torch.Tensor,
    params: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    last_token: torch.Tensor,
    out: Sampled,
    workspace: SamplerWorkspace,
) -> None:
    """Draws a token for each of S rows, into `out` and `last_token`.

    `logits` [S, vocab] of any float type, rows contiguous, not modified; `params` int32 [slots,
    RECORD_WORDS], records of `slot_params.py`; int32 `slots` [S], -1 for a row to pass over, and
    `positions` [S], where the drawn token will stand; `last_token` int32 [slots]. The counts of a slot
    that keeps them are kept up. `out` and `workspace` have at least S rows. No two rows share a slot.
    """
    rows, vocab = logits.shape
    num_tiles = workspace.tiles.shape[1]
    scan, pick = (get_config(name, logits.device) for name in ("sampler_scan", "sampler_pick"))
    block = scan.block["BLOCK"]
    rows_and_tiles = (
        logits,
        logits.stride(0),
        vocab,
        params,
        slots,
        positions,
        workspace.tiles,
        workspace.maxima,
        num_tiles,
    )
    scan_kernel[(num_tiles, rows)](*rows_and_tiles, BLOCK=block, **scan.options)
    pick_kernel[(rows,)](
        *rows_and_tiles,
        workspace.listed,
        workspace.listed_ids,
        workspace.listed.shape[1],
        last_token,
        *out,
        NUM_TOP=out.top_ids.shape[1],
        BLOCK=block,
        MAX_TILES=triton.next_power_of_2(num_tiles),
        MAX_GROUPS=triton.next_power_of_2(workspace.maxima.shape[2]),
        **pick.options,
    )
