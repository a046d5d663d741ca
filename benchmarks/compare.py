"""Ours and every peer that is installed, on the same ids, in turn.

    python benchmarks/compare.py prepare --cache FOLDER [--model FILE.gguf] --peer openvino=PYTHON ...
    python benchmarks/compare.py run --cache FOLDER [--model FILE.gguf] --peer ... --out FOLDER

`prepare` makes the forms of the model that the peers read (needs the `test` extra); it is done once. `run`
measures: 1, 8 and 32 requests at once, prompts of 128 ids, 128 new ones each, greedy, end to end; then one
prefill of 1,024 ids. A round takes these one by one, and for each every engine in a process of its own, in
rotating order: what is compared is measured within minutes, for a shared machine's speed drifts. Before each
process it waits for an idle machine and notes how idle it was. Writes compare.md, .json and .svg.

A peer is the interpreter that can import it, or for llama.cpp the folder of its tools:
openvino, ctranslate2, vllm, transformers (python), llama.cpp (folder). Peers that this interpreter can
import need not be named. How to install them: peers/README.md.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import report
from prepare import prepare

HERE = Path(__file__).parent
MODULES = {
    "transformers": "transformers",
    "openvino": "openvino_genai",
    "ctranslate2": "ctranslate2",
    "vllm": "vllm",
}
SCRIPTS = {"asyncengine": "ours.py", "llama.cpp": "llama_cpp_peer.py"} | {
    name: f"{name}_peer.py" for name in MODULES
}
OURS = "asyncengine"
LENGTH = 128
IDLE = 0.8


class Variant(NamedTuple):
    """An engine with weights of one kind."""

    engine: str
    precision: str
    """bf16, int8 or int4: what is compared with what."""
    weights: str
    """How the engine names the type."""
    form: str
    """File or folder in the cache; empty: the GGUF file itself."""
    argument: str
    """`precision` of the job."""

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weights}"


VARIANTS = (
    Variant(OURS, "bf16", "bfloat16", "", "bf16"),
    Variant(OURS, "bf16", "bfloat16, KV int8", "", "bf16 kv8"),
    Variant(OURS, "int8", "int8, KV int8", "", "int8 kv8"),
    Variant(OURS, "int4", "int4, KV int8", "", "int4 kv8"),
    Variant(OURS, "int4", "GGUF as stored, KV int8", "", "gguf kv8"),
    Variant("llama.cpp", "bf16", "BF16", "llama.cpp-bf16.gguf", "bf16"),
    Variant("llama.cpp", "int8", "Q8_0", "llama.cpp-int8.gguf", "int8"),
    Variant("llama.cpp", "int4", "Q4_0", "llama.cpp-int4.gguf", "int4"),
    Variant("llama.cpp", "int4", "GGUF as stored", "", "gguf"),
    Variant("openvino", "bf16", "fp16", "openvino-bf16", "bf16"),
    Variant("openvino", "int8", "int8", "openvino-int8", "int8"),
    Variant("openvino", "int4", "int4", "openvino-int4", "int4"),
    Variant("ctranslate2", "int8", "int8", "ctranslate2-int8", "int8"),
    Variant("vllm", "bf16", "bfloat16", "hf", "bf16"),
    Variant("transformers", "bf16", "bfloat16", "hf", "bf16"),
)


def installed(named: list[str]) -> dict[str, str]:
    """Peers by name: the interpreter, or the folder of the tools."""
    peers = {name: sys.executable for name, module in MODULES.items() if importlib.util.find_spec(module)}
    tool = shutil.which("llama-batched-bench")
    if tool:
        peers["llama.cpp"] = str(Path(tool).parent)
    for pair in named:
        name, _, path = pair.partition("=")
        if name not in SCRIPTS or not os.path.exists(path):
            sys.exit(f"--peer {pair}: known are {', '.join(SCRIPTS)}, each with a path that exists")
        # Not resolved: an interpreter of a virtual environment knows itself by its link.
        peers[name] = os.path.abspath(path)
    return peers


def prompts(count: int, length: int) -> list[list[int]]:
    return [[(number * 7 + i * 13) % 40000 + 100 for i in range(length)] for number in range(count)]


def cases(batches: list[int], prefill: int) -> dict[str, dict[str, Any]]:
    timed: dict[str, dict[str, Any]] = {
        str(n): {"prompts": prompts(n, LENGTH), "new": LENGTH, "repeats": 1} for n in batches
    }
    if prefill:
        timed["prefill"] = {"prompts": prompts(1, prefill), "new": 1, "repeats": 3}
    return timed


def processor_seconds() -> tuple[float, float]:
    """Of all processors since they started: in use, and altogether."""
    with open("/proc/stat") as file:
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in file.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def idle_share(seconds: float = 1.0) -> float:
    """Share of the processors' time that nobody used in the next `seconds`."""
    busy, total = processor_seconds()
    time.sleep(seconds)
    busy_later, total_later = processor_seconds()
    return 1 - (busy_later - busy) / max(0.01, total_later - total)


def child_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_for_idle(patience: float) -> float:
    """Returns once the machine is idle or patience is at its end; the idle share seen last."""
    end = time.monotonic() + patience
    share = idle_share()
    while share < IDLE and time.monotonic() < end:
        share = idle_share()
    return share


def run_once(variant: Variant, runner: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The runner's answer with `others`, the share of the machine that other processes used meanwhile; or
    {"error": text}."""
    script = str(HERE / "peers" / SCRIPTS[variant.engine])
    tools = variant.engine == "llama.cpp"
    command = [sys.executable, script, runner] if tools else [runner, script]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])}
    busy, total, own = *processor_seconds(), child_seconds()
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {timeout:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"exit status {done.returncode}: {done.stderr[-2000:]}"}
    busy_later, total_later = processor_seconds()
    others = (busy_later - busy) - (child_seconds() - own)
    answer: dict[str, Any] = json.loads(lines[-1])
    return {**answer, "others": max(0.0, others / max(0.01, total_later - total))}


def measure(args: argparse.Namespace, peers: dict[str, str], folder: Path) -> dict[str, Any]:
    reference = json.loads((folder / "reference.json").read_text())
    runners = {OURS: sys.executable, **peers}
    variants = [
        v
        for v in VARIANTS
        if v.engine in runners
        and (not args.engines or v.engine in args.engines)
        and v.precision in args.precisions
        and (folder / v.form).exists()
    ]
    timed = cases(args.batches, args.prefill)
    results: dict[str, Any] = {
        v.name: {"engine": v.engine, "precision": v.precision, "weights": v.weights, "rounds": []}
        for v in variants
    }
    for number in range(args.rounds):
        turn = number % len(variants)
        answers: dict[str, list[dict[str, Any]]] = {v.name: [] for v in variants}
        for case, variant in product(timed, variants[turn:] + variants[:turn]):
            result = results[variant.name]
            if "error" in result:
                continue
            checked = number == 0 and not answers[variant.name]
            idle = wait_for_idle(args.patience)
            job = {
                "model": str(folder / variant.form if variant.form else args.model),
                "precision": variant.argument,
                "threads": args.threads,
                "cases": {case: timed[case]},
                "check": {key: reference[key] for key in ("prompts", "new")} if checked else None,
            }
            answer = run_once(variant, runners[variant.engine], job, args.timeout)
            if "error" in answer:
                result["error"] = answer["error"]
                print(f"{variant.name}: {answer['error']}", file=sys.stderr, flush=True)
                continue
            ids = answer.pop("ids")
            if ids is not None:
                result["agreement"] = agreement(reference["ids"], ids)
            answers[variant.name].append({**answer, "idle_before": idle})
            told = f"round {number + 1}  {case:<8}{variant.name:<38}{answer['seconds'][case]:.2f} s"
            print(f"{told}   (others {answer['others']:.0%})", file=sys.stderr, flush=True)
        for name, parts in answers.items():
            if "error" not in results[name]:
                results[name]["rounds"].append(whole_round(parts))
    return {
        "model": args.model.name,
        "processor": processor(),
        "threads": args.threads,
        "rounds": args.rounds,
        "length": LENGTH,
        "batches": args.batches,
        "prefill": args.prefill,
        "results": results,
    }


def whole_round(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the answers to a round's cases, one after the other."""
    return {
        "version": answers[0]["version"],
        "start_s": answers[0]["start_s"],
        "seconds": {case: seconds for answer in answers for case, seconds in answer["seconds"].items()},
        "others": max(answer["others"] for answer in answers),
        "idle_before": min(answer["idle_before"] for answer in answers),
    }


def agreement(expected: list[list[int]], got: list[list[int]]) -> dict[str, float]:
    """How far greedy completions follow the reference: `tokens`, the mean share of a completion before the
    first difference; `whole`, the share of completions without any."""
    shares = []
    for ids, other in zip(expected, got, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b), len(ids))
        shares.append(same / len(ids))
    return {"tokens": sum(shares) / len(shares), "whole": shares.count(1.0) / len(shares)}


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run"))
    parser.add_argument("--cache", type=Path, required=True, help="folder of the models' forms")
    parser.add_argument("--model", type=Path, help="a GGUF file; the demo model by default")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the results")
    parser.add_argument("--engines", nargs="+", choices=SCRIPTS, help="these only")
    parser.add_argument(
        "--precisions", nargs="+", choices=("bf16", "int8", "int4"), default=["bf16", "int8", "int4"]
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, default=1024, help="ids; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for an idle machine")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one engine and case")
    args = parser.parse_args()
    if args.model is None:
        from asyncengine.checkpoint.demo import demo_model

        args.model = Path(demo_model())
    folder, peers = args.cache / args.model.stem, installed(args.peer)
    if args.command == "prepare":
        prepare(args.model, folder, peers)
        return
    if not (folder / "reference.json").exists():
        sys.exit(f"{folder} holds no prepared model; run `compare.py prepare` first")
    results = measure(args, peers, folder)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.json").write_text(json.dumps(results, indent=1))
    table = report.markdown(results)
    (args.out / "compare.md").write_text(table)
    (args.out / "compare.svg").write_text(report.svg(results))
    print(table)


if __name__ == "__main__":
    main()
