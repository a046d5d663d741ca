"""All that is to be measured on an NVIDIA GPU, in one call of eight minutes at most.

    python benchmarks/gpu.py [--list] [--part NAME ...] [--seconds 480] [--out benchmarks/results]

Every part runs in a process of its own with a time budget, so that one that fails, hangs or poisons its
CUDA context ends alone; what it had measured by then is kept. Parts that are named may take all the time
there is. Prints one table and writes
gpu-<device>-<date>.json, with versions. Weights are dummies of the real shapes; only `tests` reads a model,
the demo model where its file is installed. Run it from a checkout, with the extras `cuda` and `test`.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Part(NamedTuple):
    """`run(report, measured)` of the module `gpu_parts.<module>`; see `Report`."""

    module: str
    run: str
    seconds: float
    """Most it may take."""
    about: str


PARTS = {
    "machine": Part("machine", "run", 30, "bandwidth of reading, rate of a bf16 matrix product"),
    "tests": Part("tests", "run", 120, "tests/gpu: kernels in bf16, greedy ids, graphs against eager, sleep"),
    "kernels": Part("kernels", "run", 80, "kernels' times as a share of bandwidth or matmul rate"),
    "llama": Part("engines", "llama", 110, "Llama-3.1-8B's shape: start, decode at 1/64/256 x 1k, prefill"),
    "qwen": Part("engines", "qwen", 70, "Qwen3-0.6B's shape: the same, and nano-vllm's workload"),
    "transformers": Part("peers", "run", 70, "transformers' continuous batching, Llama's shape, 64 x 1k"),
}


class Report:
    """Where a part leaves its figures, one line each as it has them."""

    def __init__(self, path: Path, part: str) -> None:
        self._path = path
        self._part = part

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        floor: float | None = None,
        ratio: float | None = None,
        goal: str = "",
    ) -> None:
        """`floor` in the same unit; `ratio` is what `goal`, as "<= 1.2" or ">= 0.85", speaks of."""
        row = {"part": self._part, "name": name, "value": value, "unit": unit}
        row |= {"floor": floor, "ratio": ratio, "goal": goal, "met": met(ratio, goal)}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [json.loads(line) for line in lines]


def met(ratio: float | None, goal: str) -> bool | None:
    """Whether `ratio` keeps to `goal`; None where one of them is missing."""
    if ratio is None or not goal:
        return None
    relation, limit = goal.split()
    return ratio <= float(limit) if relation == "<=" else ratio >= float(limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--part", action="append", choices=PARTS, help="run only these")
    parser.add_argument("--seconds", type=float, default=480.0, help="most that all parts may take")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measured", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:14}{part.seconds:5.0f} s  {part.about}")
        return
    if args.child:
        (name,) = args.part
        part = PARTS[name]
        sys.path.insert(0, str(HERE))  # where it is not there already: under -P
        run = getattr(importlib.import_module(f"gpu_parts.{part.module}"), part.run)
        run(Report(args.child, name), json.loads(args.measured))
        return

    from asyncengine.gpus import unusable, visible_gpus

    gpus = visible_gpus()
    reason = unusable(gpus)
    if reason is not None:
        sys.exit(f"this benchmark needs an NVIDIA GPU: {reason}")
    chosen = [name for name in PARTS if not args.part or name in args.part]
    if "machine" not in chosen:
        chosen.insert(0, "machine")  # the others' floors are made of its rates
    results: dict[str, Any] = {
        "device": gpus[0].name,
        "memory": gpus[0].memory,
        "capability": gpus[0].capability,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }
    results |= run_parts(chosen, args.seconds, args.part or ())
    print(table(results))
    slug = re.sub(r"[^a-z0-9]+", "-", gpus[0].name.lower()).strip("-")
    path = args.out / f"gpu-{slug}-{results['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")
    sys.exit(1 if results["failures"] else 0)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("asyncengine", "torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        found["driver"] = done.stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        found["driver"] = "unknown"
    return found


def run_parts(chosen: list[str], seconds: float, unbounded: Collection[str] = ()) -> dict[str, Any]:
    """Rows, failures by part, and how long each part took; those that are `unbounded` may take all of the
    `seconds` that are left."""
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            left = deadline - time.monotonic()
            if left < 1:
                failures[name] = f"not begun: the {seconds:g} s were over"
                continue
            begin = time.monotonic()
            report = Report(Path(folder) / f"{name}.jsonl", name)
            measured = {row["name"]: row["value"] for row in rows if row["part"] == "machine"}
            print(f"{name} ...", file=sys.stderr, flush=True)
            failure = run_part(
                name, report, measured, left if name in unbounded else min(PARTS[name].seconds, left)
            )
            took[name] = time.monotonic() - begin
            rows += report.rows()
            if failure:
                failures[name] = failure
    return {"rows": rows, "failures": failures, "seconds": took}


def run_part(name: str, report: Report, measured: dict[str, float], seconds: float) -> str:
    """Why it failed; empty where it did not."""
    command = [sys.executable, str(Path(__file__)), "--part", name, "--child", str(report._path)]
    command += ["--measured", json.dumps(measured)]
    # A session of its own: what it has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        return f"took more than {seconds:.0f} s\n{errors.strip()[-3000:]}".strip()
    if process.returncode == 0:
        return ""
    return errors.strip()[-3000:] or f"ended with code {process.returncode}"


def table(results: dict[str, Any]) -> str:
    """Figures beside their floors and goals, as Markdown, and what failed."""
    lines = [
        f"{results['device']}, {results['date']}, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "",
        "| part | what | measured | floor | ratio | goal |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        floor = "" if row["floor"] is None else f"{row['floor']:,.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        goal = row["goal"] and f"{row['goal']} {'met' if row['met'] else 'MISSED'}"
        if row["goal"] and row["met"] is None:
            goal = f"{row['goal']} unknown"
        value = f"{row['value']:,.4g} {row['unit']}"
        lines.append(f"| {row['part']} | {row['name']} | {value} | {floor} | {ratio} | {goal} |")
    for name, failure in results["failures"].items():
        lines += ["", f"{name} failed: {failure}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
