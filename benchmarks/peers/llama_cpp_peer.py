"""llama.cpp's own tools. Model: a GGUF file, whatever its type; `precision` is that of the file.

Times are those of `llama-batched-bench`: prompts, then decode steps, nothing of sampling, text or transport,
so they are the least that its server can take. It fills prompts itself; their number and lengths are those
of the case. `llama-server`, if it is in the same folder, completes the prompts of the check.
Run as: python llama_cpp_peer.py FOLDER_OF_THE_TOOLS
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runner import read_job, reply

CHECK_SECONDS = 120


def bench(folder: str, job: dict[str, Any], case: dict[str, Any]) -> float:
    """Seconds of the prompts and of the decode steps: one fewer than ids, the prompt gives the first."""
    count, length, steps = len(case["prompts"]), len(case["prompts"][0]), case["new"] - 1
    done = subprocess.run(
        [
            os.path.join(folder, "llama-batched-bench"),
            *("-m", job["model"], "-t", str(job["threads"]), "-tb", str(job["threads"])),
            *("-npp", str(length), "-ntg", str(max(1, steps)), "-npl", str(count)),
            *("-c", str(count * (length + steps + 1)), "-b", "2048", "-ub", "512"),
            *("--output-format", "jsonl"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    # Not read as JSON: a speed may be written as nan.
    prompts, decode = (float(re.findall(rf'"{key}": ([0-9.]+)', line)[0]) for key in ("t_pp", "t_tg"))
    return prompts + decode if steps else prompts


def complete(folder: str, job: dict[str, Any]) -> tuple[float, list[list[int]] | None]:
    """Seconds until the server takes requests, and the completions of the check; None if it gives none."""
    check = job["check"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.perf_counter()
    server = subprocess.Popen(
        [
            os.path.join(folder, "llama-server"),
            *("-m", job["model"], "-t", str(job["threads"]), "--port", str(port)),
            *("-np", "4", "-c", "8192", "--no-webui"),
        ],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"llama-server ended with {server.returncode}")
                time.sleep(0.01)
        start_s = time.perf_counter() - begin

        def ask(prompt: list[int]) -> list[int]:
            body = {
                "prompt": prompt,
                "n_predict": check["new"],
                "temperature": 0,
                "top_k": 1,
                "ignore_eos": True,
                "return_tokens": True,
                "cache_prompt": False,
            }
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=CHECK_SECONDS) as answer:
                ids: list[int] = json.load(answer)["tokens"]
            return ids

        try:
            with ThreadPoolExecutor(4) as pool:
                return start_s, list(pool.map(ask, check["prompts"]))
        except OSError as error:
            # It has been seen to stop answering; its times are measured without it.
            print(f"llama-server: {error}", file=sys.stderr)
            return start_s, None
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    folder = sys.argv[1]
    job, answer = read_job()
    told = subprocess.run(
        [os.path.join(folder, "llama-batched-bench"), "--version"], capture_output=True, text=True
    )
    version = re.search(r"version: (\S+)", told.stdout + told.stderr)
    seconds = {
        name: min(bench(folder, job, case) for _ in range(case["repeats"]))
        for name, case in job["cases"].items()
    }
    start_s, ids = None, None
    if job["check"] and os.path.exists(os.path.join(folder, "llama-server")):
        start_s, ids = complete(folder, job)
    reply(
        answer,
        {"version": version[1] if version else "?", "start_s": start_s, "seconds": seconds, "ids": ids},
    )


if __name__ == "__main__":
    main()
