"""What the engine costs its host before the first token: time and memory.

    python benchmarks/startup.py [--model FILE.gguf] [--dtype bfloat16] [--rounds 5]

import     seconds of `from asyncengine import AsyncLLM`, beyond the interpreter's own start
create     seconds of `AsyncLLM.create`, by stage
first      seconds from calling `create` to the first token of a short chat
host       MiB of the host process after `create`, above a bare interpreter
worker     MiB of the worker process after the first token, and at most while loading

Every round is a process of its own; the medians are printed. The model's files are in the page cache
after the first, discarded round. Needs psutil (in the `test` extra).
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time

BARE = "import os; print(int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE'))"


async def one_round(model: str, dtype: str) -> dict[str, float]:
    begin = time.perf_counter()
    from asyncengine import AsyncLLM

    figures = {"import_s": time.perf_counter() - begin}
    import psutil

    begin = time.perf_counter()
    llm = await AsyncLLM.create(model, dtype=dtype)
    figures["create_s"] = time.perf_counter() - begin
    figures["host_mib"] = psutil.Process().memory_info().rss / 2**20
    async for _ in llm.chat([{"role": "user", "content": "Hello!"}], max_tokens=8):
        figures.setdefault("first_s", time.perf_counter() - begin)
    figures |= {f"{stage.name}_s": stage.seconds for stage in llm.startup.stages}
    (worker,) = psutil.Process().children()
    figures["worker_mib"] = worker.memory_info().rss / 2**20
    with open(f"/proc/{worker.pid}/status") as file:
        figures["worker_peak_mib"] = (
            next(int(row.split()[1]) for row in file if row.startswith("VmHWM")) / 1024
        )
    assert "torch" not in sys.modules
    await llm.aclose()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; the demo model by default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(asyncio.run(one_round(args.model, args.dtype))))
        return
    if args.model is None:
        from asyncengine.checkpoint.demo import demo_model

        args.model = demo_model()
    command = [sys.executable, __file__, "--one", "--model", args.model, "--dtype", args.dtype]
    rounds = []
    for number in range(args.rounds + 1):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        if number:
            rounds.append(json.loads(done.stdout))
    bare = int(subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True).stdout) / 2**20
    median = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    print(f"{args.dtype}, medians of {args.rounds} rounds")
    print(f"import     {median['import_s']:8.3f} s")
    stages = ", ".join(
        f"{name} {median[name + '_s']:.3f}" for name in ("config", "load", "profile", "allocate", "capture")
    )
    print(f"create     {median['create_s']:8.3f} s   ({stages})")
    print(f"first      {median['first_s']:8.3f} s")
    print(f"host       {median['host_mib'] - bare:8.1f} MiB above {bare:.1f}")
    print(f"worker     {median['worker_mib']:8.1f} MiB, at most {median['worker_peak_mib']:.1f}")


if __name__ == "__main__":
    main()
