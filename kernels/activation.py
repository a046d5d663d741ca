"""Gated activations: act(gate) * up of rows that hold the gate's columns and then those of up."""

from typing import Literal

import torch
import triton
import triton.language as tl

from .configs import get_config

__all__ = ["Activation", "gated"]

Activation = Literal["silu", "gelu", "gelu_tanh"]


@triton.jit
def gated_kernel(out, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh z) is the logistic function of 2 z, which cannot overflow to NaN.
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * z))
    tl.store(out + row * WIDTH + column, (y * up).to(out.dtype.element_ty), mask=inside)


def gated(out: torch.Tensor, gate_up: torch.Tensor, activation: Activation = "silu") -> None:
    """out = act(gate) * up, computed in float32.

    `gate_up` [rows, 2 width] contiguous, gate first; `out` [rows, width] contiguous. `gelu` is the exact
    function, `gelu_tanh` its approximation by a hyperbolic tangent.
    """
    rows, width = out.shape
    config = get_config("gated", out.device)
    block = min(config.block["BLOCK"], triton.next_power_of_2(width))
    gated_kernel[(rows, triton.cdiv(width, block))](
        out, gate_up, WIDTH=width, BLOCK=block, ACTIVATION=activation, **config.options
    )
