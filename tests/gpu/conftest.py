"""Tests for machines with an NVIDIA GPU: `pytest tests/gpu`, in a process of its own, for the tests of the
kernels elsewhere put Triton into its interpreter. `benchmarks/gpu.py` runs them too."""

from importlib.util import find_spec

import pytest

if find_spec("torch") is None or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    """The first GPU; skips where there is none, and among tests that interpret kernels."""
    import torch
    from triton import knobs

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if knobs.runtime.interpret:
        pytest.skip("kernels are interpreted in this process; run pytest tests/gpu by itself")
    return torch.device("cuda")
