import pytest
import torch

from asyncengine.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = x.double()
    return exact / torch.sqrt((exact * exact).mean(dim=1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 96), (5, 576), (2, 4096)])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, weight = (2 * torch.randn(rows, width)).to(dtype), torch.randn(width).to(dtype)
    exact = reference(x, weight)
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-6}
    out = torch.full((rows + 1, width), 7.0, dtype=dtype)
    rms_norm(out[:rows], x, weight, EPS)
    torch.testing.assert_close(out[:rows].double(), exact, **tolerance)
    assert (out[rows] == 7).all()
    rms_norm(x, x, weight, EPS)
    assert torch.equal(x, out[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_norm_is_of_the_rounded_residual(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, residual = torch.randn(4, 200).to(dtype), (100 * torch.randn(4, 200)).to(dtype)
    weight = torch.randn(200)
    total = (x.float() + residual.float()).to(dtype)
    add_rms_norm(x, residual, x, weight, EPS)
    assert torch.equal(residual, total)
    torch.testing.assert_close(x.double(), reference(total, weight), rtol=1e-3, atol=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 64)
    rms_norm(x, x, torch.ones(64), EPS)
    assert torch.equal(x, torch.zeros(2, 64))
