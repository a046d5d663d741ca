"""Root-mean-square norm of rows, alone or together with the addition to the residual before it."""

import torch
import triton
import triton.language as tl

from .configs import get_config

__all__ = ["add_rms_norm", "rms_norm"]


@triton.jit
def rms_norm_kernel(
    out, x, residual, weight, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        # Rounded before it is normed, so that the norm is one of what the next layer will read.
        total = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) + value
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


def _launch(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, add: bool
) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    config = get_config("rms_norm", x.device)
    rms_norm_kernel[(rows,)](
        out, x, residual, weight, eps, WIDTH=width, BLOCK=block, ADD=add, **config.options
    )


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row.

    `out` and `x` [rows, width] contiguous (they may be the same), `weight` [width]; any float types,
    computed in float32 and rounded once.
    """
    _launch(out, x, x, weight, eps, False)


def add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual += x; out = rms_norm(residual). Shapes and types as in `rms_norm`; `out` may be `x`."""
    _launch(out, x, residual, weight, eps, True)
