"""What every engine's script does: read a job, run it, print one JSON line.

Runs in the interpreter of the engine, which may have nothing of ours: standard library only.

Job (stdin, JSON)::

    model      path of the model in the engine's own form
    precision  bf16, int8 or int4, or another name that the engine's script knows
    threads    compute threads
    cases      {name: {"prompts": [[id]], "new": n, "repeats": n}}: timed
    check      {"prompts": [[id]], "new": n} or null: completions to compare, not timed

Answer: version, start_s (seconds until the engine takes requests), seconds {name: least of the repeats},
ids (completions of `check`; null where the engine cannot tell them).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Greedy completion of all prompts at once by exactly `new` ids each, ends of text ignored."""


class Engine(NamedTuple):
    version: str
    generate: Generate
    close: Callable[[], object] = lambda: None


def serve(start: Callable[[dict[str, Any]], Engine]) -> None:
    """`start` loads the job's model."""
    job, answer = read_job()
    begin = time.perf_counter()
    engine = start(job)
    start_s = time.perf_counter() - begin
    generate = engine.generate
    generate([case["prompts"][0][:16] for case in job["cases"].values()][:1], 8)
    seconds = {}
    for name, case in job["cases"].items():
        # The first batch of a size pays for its memory, and for kernels chosen by shape.
        complete(generate, case["prompts"], case["new"])
        seconds[name] = min(
            complete(generate, case["prompts"], case["new"])[0] for _ in range(case["repeats"])
        )
    check = job["check"]
    ids = complete(generate, check["prompts"], check["new"])[1] if check else None
    engine.close()
    reply(answer, {"version": engine.version, "start_s": start_s, "seconds": seconds, "ids": ids})


def complete(generate: Generate, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """Seconds and ids; ends the process if these are fewer or more than asked for."""
    begin = time.perf_counter()
    ids = generate(prompts, new)
    seconds = time.perf_counter() - begin
    if [len(row) for row in ids] != [new] * len(prompts):
        sys.exit(f"{len(prompts)} x {new} ids were asked for; rows have {sorted({len(row) for row in ids})}")
    return seconds, ids


def read_job() -> tuple[dict[str, Any], int]:
    """The job, and the descriptor for its answer; what an engine prints goes to stderr from now on."""
    job: dict[str, Any] = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)
    return job, answer


def reply(descriptor: int, answer: dict[str, Any]) -> None:
    """Writes the answer and leaves at once: some engines crash while they are torn down."""
    with os.fdopen(descriptor, "w") as out:
        out.write(json.dumps(answer) + "\n")
    os._exit(0)
