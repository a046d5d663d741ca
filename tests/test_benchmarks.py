"""What the benchmarks compute from their measurements, on numbers worked out by hand."""

import importlib
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield by_name
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(FOLDER):
            del sys.modules[name]


def rounds(*seconds: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"seconds": {"8": s, "prefill": p}, "start_s": 1.0, "others": 0.02} for s, p in seconds]


RESULTS: dict[str, Any] = {
    "model": "m.gguf",
    "processor": "p",
    "threads": 2,
    "rounds": 3,
    "length": 128,
    "batches": [8],
    "prefill": 1024,
    "results": {
        "asyncengine int8": {
            "engine": "asyncengine",
            "precision": "int8",
            "rounds": rounds((2.0, 0.5), (1.0, 0.4), (4.0, 0.5)),
            "agreement": {"tokens": 0.9, "whole": 0.75},
        },
        "llama.cpp Q8_0": {
            "engine": "llama.cpp",
            "precision": "int8",
            "rounds": rounds((6.0, 2.0), (6.0, 2.0), (6.0, 2.0)),
        },
        "openvino int8": {
            "engine": "openvino",
            "precision": "int8",
            "rounds": rounds((4.0, 9.0), (4.0, 9.0), (4.0, 9.0)),
        },
        "vllm bfloat16": {"engine": "vllm", "precision": "bf16", "rounds": [], "error": "no\nway"},
    },
}


def test_table(load: Any) -> None:
    text: str = load("report").markdown(RESULTS)
    # 8 x 128 tokens in 2, 1 and 4 s; the best peer takes 4 s, and for the prefill another one 2 s.
    assert "| asyncengine int8 | 512 (256–1,024) | 500 (400–500) | 1.0 | 90% (75%) |" in text
    assert "| **2.00 (1.00–4.00)** openvino | **4.00 (4.00–5.00)** llama.cpp |" in text
    assert "| goal | ≥ 3.0 | ≥ 1.5 |" in text
    assert "vllm bfloat16 failed: no" in text
    assert "| bf16 |" not in text


def test_chart(load: Any) -> None:
    root = ET.fromstring(load("report").svg(RESULTS))
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") != "white"]
    heights = [float(bar.get("height", "0")) for bar in bars]
    # Of 150 for the fastest round, 1,024 tokens per second: medians of 512, 170.7 and 256.
    assert heights[:3] == [75.0, 25.0, 37.5] and len(heights) == 6


def test_agreement(load: Any) -> None:
    found = load("compare").agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]])
    assert found == {"tokens": 0.75, "whole": 0.5}


def test_scores_are_log_softmax(load: Any) -> None:
    logits = np.random.default_rng(0).normal(0, 5, (7, 50)).astype(np.float32)
    following = np.arange(7, dtype=np.int32)
    scores = load("perplexity").score(logits, following)
    odds = np.exp(logits.astype(np.float64))
    expected = np.log(odds[np.arange(7), following] / odds.sum(axis=1))
    np.testing.assert_allclose(scores.logprobs, expected, rtol=1e-12)
    assert scores.best.tolist() == [max(range(50), key=lambda i, row=row: row[i]) for row in logits.tolist()]


def test_damaged_model_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = load("models")
    monkeypatch.setattr(models, "part", lambda scratch, number: b"something else")
    with pytest.raises(ValueError, match="part 1 has the SHA-256"):
        models.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
