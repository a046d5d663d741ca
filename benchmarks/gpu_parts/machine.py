"""What the GPU gives at best: the rates that every floor is made of."""

from typing import Any

import torch
from triton.testing import do_bench

from .shapes import BANDWIDTH, FLOPS

__all__ = ["median_ms", "run"]


def median_ms(launch: Any, rep: int = 100) -> float:
    """Milliseconds of one launch, with a cold L2 cache; `rep` milliseconds are spent on it."""
    return float(do_bench(launch, warmup=25, rep=rep, return_mode="median"))


def run(report: Any, measured: dict[str, float]) -> None:
    report.add(BANDWIDTH, _bandwidth(), "TB/s")
    # The products of a prefill of 8,192 tokens, not a square of the best size.
    best = 0.0
    for inner, outer in ((4096, 28672), (14336, 4096), (8192, 8192)):
        a = torch.randn(8192, inner, dtype=torch.bfloat16, device="cuda")
        b = torch.randn(outer, inner, dtype=torch.bfloat16, device="cuda")
        best = max(best, 2 * 8192 * inner * outer / median_ms(lambda a=a, b=b: a @ b.T))
    report.add(FLOPS, best * 1e3 / 1e12, "TFLOP/s")


def _bandwidth() -> float:
    """TB/s, by the better one of two ways to read 4 GiB, which is large beside any L2 cache."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copying = 2 * source.nbytes / median_ms(lambda: target.copy_(source))
    adding_up = source.nbytes / median_ms(lambda: torch.sum(source))
    return max(copying, adding_up) * 1e3 / 1e12
