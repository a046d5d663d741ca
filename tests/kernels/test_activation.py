import math

import pytest
import torch

from asyncengine.kernels.activation import Activation, gated

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # exp of large gates, whose inverse is 0


def reference(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (2, 1536)])
def test_gated(rows: int, width: int, activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
    out = torch.full((rows + 1, width), 7.0, dtype=dtype)
    gated(out[:rows], gate_up, activation)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(out[:rows].double(), reference(gate_up, activation), **tolerance)
    assert (out[rows] == 7).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_large_gates_neither_overflow_nor_vanish(activation: Activation) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    out = torch.zeros(1, 4)
    gated(out, gate_up, activation)
    assert out.tolist() == [[0.0, 0.0, 200.0, 1e4]]
