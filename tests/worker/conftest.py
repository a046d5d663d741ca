"""The CUDA backend runs on CPU tensors here, its kernels in Triton's interpreter."""

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_cuda_*.py"]
else:
    from .. import interpreter  # noqa: F401
