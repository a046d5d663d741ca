"""What the benchmarks compute from their measurements, on numbers worked out by hand."""

import asyncio
import importlib
import math
import os
import re
import subprocess
import sys
import time
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
    assert "| goal, demo model | ≥ 3.0 | ≥ 1.5 |" in text
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


# ---- cpu_step.py


@pytest.mark.parametrize("rounded", [False, True])
def test_floor_of_a_cpu_step(load: Any, rounded: bool) -> None:
    from asyncengine._fast import cpu
    from asyncengine.worker.ops.cpu import Code, Operation, Rows

    operations = [
        Operation(Code.EMBED, Rows.TOKENS, (), ()),
        Operation(Code.LINEAR, Rows.TOKENS, (), (64, 96, cpu.BF16, 0, 0, 0, 0, rounded)),
        Operation(Code.ATTENTION, Rows.TOKENS, (), (4, 2, 16, 0, 32, cpu.F32, 0, 0, 0)),
        Operation(Code.HEAD, Rows.SAMPLES, (), (128, 96, cpu.F32, 0, 0, 0, 0)),
    ]
    # One sequence decodes after 9 positions, another one starts with 5: 6 tokens, 2 of them sampled.
    rows = [(0, 9, 1), (1, 0, 5)]
    peaks = {"read": 1e6, "f32": 4e6, "bf16": 8e6, "int8": 1e9}
    floor = load("cpu_step").floor_of(operations, rows, peaks)
    keys_and_values = (10 + 5) * 2 * (2 * 16) * 4
    assert floor.memory == pytest.approx((64 * 96 * 2 + 128 * 96 * 4 + keys_and_values) / 1e3)
    # Two products per query head, element and visible position: 10 + (1 + 2 + 3 + 4 + 5) of them.
    f32 = 2 * 2 * 128 * 96 + 2 * 2 * 25 * 4 * 16
    assert floor.arithmetic == pytest.approx(2 * 6 * 64 * 96 / 8e3 + f32 / 4e3)


@pytest.mark.parametrize("format", [["--quantization", "int8"], ["--dtype", "bfloat16"]])
def test_cpu_step_prints_best_and_median(demo_gguf: str, format: list[str]) -> None:
    """On the demo model, with few and small steps."""
    command = [sys.executable, str(Path(FOLDER) / "cpu_step.py"), *format, "--batch", "1"]
    command += ["--context", "8", "--prefill", "16", "--repeats", "3", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("decode 1", "prefill 16"):
        found = re.search(
            rf"^{name} +best ([\d.]+) ms \((\d+)% of it the floor\), median ([\d.]+) \((\d+)%\)"
            r"   floor ([\d.]+): memory ([\d.]+), arithmetic ([\d.]+)   .*\n"
            r" +peaks before, after in G/s: read",
            done.stdout,
            re.MULTILINE,
        )
        assert found, done.stdout
        best, at_best, median, at_median, floor, *limits = (float(word) for word in found.groups())
        assert best <= median and at_best >= at_median and floor == max(limits) > 0
        assert at_best == pytest.approx(100 * floor / best, abs=1.5)


# ---- gpu.py


def test_floors_are_those_of_the_research(load: Any) -> None:
    shapes = load("gpu_parts.shapes")
    floor = shapes.Floor(shapes.LLAMA_8B, 4.3e12, 790e12)
    # Llama-3.1-8B has 8.03 G parameters, of which the table's 0.525 G are not read.
    assert floor.layer_params + floor.head_params == pytest.approx(7.505e9, rel=1e-4)
    assert floor.kv_bytes == 128 * 1024
    steps = [1e3 * floor.decode(batch, 1024) for batch in (1, 64, 256)]
    assert steps == pytest.approx([3.52, 5.49, 12.85], abs=0.006)
    assert [1e3 * floor.prefill(n) for n in (1024, 8192)] == pytest.approx([18.4, 167], rel=3e-3)


def test_shapes_are_those_of_the_models(load: Any) -> None:
    from asyncengine.checkpoint.config import spec_from_config

    shapes = load("gpu_parts.shapes")
    llama, qwen = (spec_from_config(shape) for shape in shapes.SHAPES.values())
    assert (llama.num_layers, llama.head_dim, llama.rope_scaling.type) == (32, 128, "llama3")
    assert (qwen.num_layers, qwen.qk_norm, qwen.tie_embeddings) == (28, True, True)
    floor = shapes.Floor(shapes.QWEN3_06B, 1.0, 1.0)
    # The published size, 0.596 G parameters (0.44 G without the embedding), but for the norms.
    assert floor.layer_params + floor.head_params == pytest.approx(0.596e9, rel=1e-3)


def test_nano_vllm_workload(load: Any) -> None:
    shapes = load("gpu_parts.shapes")
    requests = shapes.nano_vllm()
    assert len(requests) == 256 and sum(r.max_tokens for r in requests) == shapes.NANO_TOKENS == 133_966
    assert all(100 <= len(r.prompt) <= 1024 for r in requests)


def test_steady_steps(load: Any) -> None:
    engines = load("gpu_parts.engines")
    # 10 steps of a filling batch, 34 of all 4 sequences, 10 ms apart and 9 of them at work, then an emptying.
    samples = [2] * 10 + [4] * 34 + [1] * 5
    steps = [engines.Step(0.01 * i, n, 0.009) for i, n in enumerate(samples)]
    found = engines.steady(steps, 4)
    assert found.first == 2
    assert (found.step, found.device, found.idle) == pytest.approx((0.01, 0.009, 0.1))
    with pytest.raises(ValueError, match="only 5 of 49"):
        engines.steady(steps, 1)


def test_goals_and_table(load: Any) -> None:
    gpu = load("gpu")
    assert gpu.met(1.1, "<= 1.2") and not gpu.met(1.3, "<= 1.2") and gpu.met(0.9, ">= 0.85")
    assert gpu.met(None, "<= 1.2") is None and gpu.met(1.0, "") is None
    row = {"part": "p", "name": "n", "value": 6.0, "unit": "ms", "floor": 5.0, "ratio": 1.2, "goal": "<= 1.1"}
    results = {
        "device": "d",
        "date": "2026-01-01",
        "versions": {"torch": "2"},
        "rows": [row | {"met": False}],
    }
    text = gpu.table(results | {"failures": {"q": "no\nway"}})
    assert "| p | n | 6 ms | 5 | 1.200 | <= 1.1 MISSED |" in text and "q failed: no\nway" in text


@pytest.mark.parametrize("ending", ["works", "raises", "hangs"])
def test_a_part_ends_alone_and_keeps_what_it_had(load: Any, tmp_path: Path, ending: str) -> None:
    """Through processes: gpu.py as a child runs a part of a module that is made up here."""
    (tmp_path / "gpu.py").write_text((Path(FOLDER) / "gpu.py").read_text())
    (tmp_path / "gpu_parts").mkdir()
    (tmp_path / "gpu_parts" / "machine.py").write_text(
        "import time\n"
        "def run(report, measured):\n"
        "    report.add('x', measured['y'], 'ms', ratio=1.0, goal='<= 2')\n"
        f"    if {ending!r} == 'raises': raise RuntimeError('on purpose')\n"
        f"    if {ending!r} == 'hangs': time.sleep(60)\n"
    )
    gpu = load("gpu")
    gpu.__file__ = str(tmp_path / "gpu.py")
    report = gpu.Report(tmp_path / "rows.jsonl", "machine")
    failure = gpu.run_part("machine", report, {"y": 3.0}, 5.0)
    assert [(row["value"], row["met"]) for row in report.rows()] == [(3.0, True)]
    expected = {"works": "", "raises": "on purpose", "hangs": "took more than 5 s"}[ending]
    assert expected in failure and bool(failure) == bool(expected)


def test_the_part_of_the_tests_tells_outcomes_as_they_come(load: Any, tmp_path: Path) -> None:
    copied, tests = tmp_path / "benchmarks", tmp_path / "tests" / "gpu"
    (copied / "gpu_parts").mkdir(parents=True)
    for name in ("gpu.py", "gpu_parts/tests.py"):
        (copied / name).write_text((Path(FOLDER) / name).read_text())
    tests.mkdir(parents=True)
    (tests / "test_x.py").write_text(
        "import pytest, time\n"
        "def test_good(): print('not shown')\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_no(): pytest.skip('no GPU')\n"
        "def test_slow(): time.sleep(float(open(__file__[:-3]).read()))\n"
    )
    gpu = load("gpu")
    gpu.__file__ = str(copied / "gpu.py")
    for seconds, failure in (("0", "1 failed, 2 passed, 1 skipped"), ("60", "took more than 10 s")):
        (tests / "test_x").write_text(seconds)
        report = gpu.Report(tmp_path / f"{seconds}.jsonl", "tests")
        assert failure in gpu.run_part("tests", report, {}, 10.0)
        first, *rows = [(row["name"], row["value"], row["met"]) for row in report.rows()]
        assert first[0].startswith("test_bad: ") and "Error" in first[0]
        if seconds == "0":
            assert rows == [("tests that passed", 2, False), ("tests that were skipped", 1, None)]


def test_gpu_needs_a_gpu_and_says_so() -> None:
    script = str(Path(FOLDER) / "gpu.py")
    listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == ["machine", "tests", "kernels", "llama", "qwen", "transformers"]
    assert sum(float(line.split()[1]) for line in listed.stdout.splitlines()) <= 480
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=hidden, capture_output=True, text=True)
    assert done.returncode == 1 and "needs an NVIDIA GPU: no NVIDIA GPU is visible" in done.stderr


def test_engine_parts_run_on_a_small_shape(load: Any) -> None:
    """All that the engine parts do, on a CPU."""
    shapes, engines = load("gpu_parts.shapes"), load("gpu_parts.engines")
    small = shapes.QWEN3_06B | {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50000,
    }  # fmt: skip
    rows: dict[str, float] = {}

    class Report:
        def add(self, name: str, value: float, unit: str, **others: Any) -> None:
            rows[name] = value

    async def run() -> None:
        floor = engines.floor_of(small, {"read bandwidth": 0.02, "bf16 matmul": 0.5})
        async with engines.open_engine(small, device="cpu", max_model_len=256) as llm:
            await engines.measure_prefill(Report(), llm, floor, (32, 128))
            await engines.measure_decode(Report(), llm, floor, 4, 64, 48)

    asyncio.run(run())
    assert len(rows) == 8
    assert rows["device time of a decode step, 4 x 64"] > 0 and 0 <= rows["idle between steps, 4 x 64"] <= 100
    assert 0 < rows["prefill of 32"] <= rows["time to first token, 32 in"]


# ---- tune.py


def test_search_changes_one_axis_at_a_time(load: Any) -> None:
    grids = load("gpu_parts.grids")
    axes = {"A": (1, 2, 4, 8), "B": (1, 2, 3), "num_warps": (4, 8)}
    grid = grids.Grid("f", lambda device: iter(()), axes, lambda n: None if n["A"] * n["B"] > 16 else n)
    tried = []

    def cost(numbers: dict[str, int]) -> float:
        tried.append(numbers)
        if numbers["num_warps"] == 8:
            return math.inf
        return 0.5 + abs(math.log2(numbers["A"]) - 2) + abs(numbers["B"] - 3) / 10

    start = {"A": 1, "B": 1, "num_warps": 4}
    best, finished = grids.search(grid, start, cost, time.monotonic() + 60)
    assert best == {"A": 4, "B": 3, "num_warps": 4} and finished
    assert all(n["A"] * n["B"] <= 16 for n in tried) and len(tried) == len({str(n) for n in tried}) < 22
    assert grids.search(grid, start, cost, time.monotonic() - 1) == (start, False)
    # Noise is no gain.
    assert grids.search(grid, start, lambda n: 1 - 0.009 * (n != start), math.inf) == (start, True)
    order = grids.candidates(grid, start)
    assert order[0] == start and len(order) == 22  # 8 x 3 is too much, twice
    assert sum(sum(n[name] != start[name] for name in axes) == 1 for n in order[:7]) == 6


def test_what_is_shipped_lies_on_the_grids(load: Any) -> None:
    from asyncengine.kernels.configs import CONFIGS

    grids = load("gpu_parts.grids").GRIDS
    assert list(grids) == list(CONFIGS)
    for name, entries in CONFIGS.items():
        for block, options in entries.values():
            numbers = block | options
            assert all(numbers[axis] in values for axis, values in grids[name].axes.items()), name
            axes = {axis: numbers[axis] for axis in grids[name].axes}
            assert grids[name].complete(axes) == numbers, name


def test_entries_are_rewritten_in_place(load: Any) -> None:
    tune = load("tune")
    text = tune.TABLE.read_text()

    def table(of: str) -> Any:
        space: dict[str, Any] = {"__name__": "configs"}
        exec(of, space)
        return {
            name: {c: dict(v._asdict()) for c, v in known.items()} for name, known in space["CONFIGS"].items()
        }

    name, numbers = "attention_decode_64", tune.numbers_of("attention_decode_64", 90) | {"BLOCK_N": 128}
    expected = table(text)
    changed = tune.with_entry(text, name, 89, numbers, "Some GPU, 2026-01-01")
    block = {n: v for n, v in numbers.items() if n.isupper()}
    options = {n: v for n, v in numbers.items() if not n.isupper()}
    expected[name][89] = {"block": block, "options": options}
    assert table(changed) == expected and list(table(changed)[name]) == [80, 89, 90]
    assert max(map(len, changed.splitlines())) <= 110
    # Again, with another result: its comment goes, and what others wrote stays.
    again = tune.with_entry(changed, name, 89, numbers | {"PROGRAMS": 1}, "Some GPU, 2026-01-02")
    expected[name][89]["block"] = block | {"PROGRAMS": 1}
    assert table(again) == expected
    assert again.count("Some GPU") == 1 and len(again.splitlines()) == len(text.splitlines()) + 2
    with pytest.raises(ValueError, match="no table of 'other'"):
        tune.with_entry(text, "other", 89, numbers, "")


def test_differences_and_flaws(load: Any) -> None:
    import torch

    tune, builds, Workload = load("tune"), load("gpu_parts.builds"), load("gpu_parts.workloads").Workload
    floats, ids = torch.tensor([1.0, -2.0, 100.0]).bfloat16(), torch.arange(50)
    work = [Workload("w", lambda: lambda: None, (floats, ids), slack=0.04)]

    def difference(a: torch.Tensor, b: torch.Tensor) -> str:
        return str(tune.difference([[floats, ids]], [[a, b]], work))

    assert not difference(floats * 1.01, torch.where(ids < 2, 7, ids))
    assert "3 of 50 integers" in difference(floats, torch.where(ids < 3, 7, ids))
    assert "another output at w, by 3" in difference(floats + torch.tensor([0.0, 0.0, 3.0]), ids)
    assert "another output" in difference(floats * math.nan, ids)
    assert tune.mean_ratio([2.0, 9.0], [1.0, 2.0]) == pytest.approx(3.0)
    assert builds.flaw([builds.Build("f", 255, 0, 99 * 1024)], 89) == ""
    assert "16 bytes of stack" in builds.flaw([builds.Build("f", 9, 0, 0), builds.Build("f", 255, 16, 0)], 90)
    assert "shared memory, of 101376" in builds.flaw([builds.Build("f", 9, 0, 100 * 1024)], 86)


def test_tuning_compiles_without_a_gpu() -> None:
    script = str(Path(FOLDER) / "tune.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(*options: str) -> Any:
        command = [sys.executable, script, *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    chosen = [option for name in ("rms_norm", "attention_decode_128") for option in ("--kernel", name)]
    done = run("--compile", "90", "--seconds", "3", *chosen)
    assert done.returncode == 0, done.stderr[-2000:]
    norm, decode = done.stdout.split("attention_decode_128, at most 232448 bytes")
    assert "shipped: num_warps=8\n" in norm and "shipped: MAX_M=32" in decode and "are left out" in decode
    # Two widths; a tile of 16 lines and one of 32.
    usage = [re.findall(r"(\d+) registers, 0 stack, (\d+) shared", part) for part in (norm, decode)]
    assert len(usage[0]) == 8 or "are left out" in norm
    assert len(usage[1]) >= 2 and all(0 < int(registers) <= 255 for registers, _ in usage[0] + usage[1])
    # Three stages of 64 keys and values of 128 elements in bfloat16; ptxas may add to it.
    assert all(int(shared) >= 2 * 2 * 64 * 128 * 2 for _, shared in usage[1][:2])
    done = run()
    assert done.returncode == 1 and "tuning needs an NVIDIA GPU: no NVIDIA GPU is visible" in done.stderr
