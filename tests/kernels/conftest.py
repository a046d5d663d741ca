"""Kernels run in Triton's interpreter here; what a GPU would get is compiled in processes of their own."""

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from .. import interpreter  # noqa: F401
