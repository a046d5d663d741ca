"""What a step costs the host: the real scheduler and ring, and a worker process that computes nothing.

Every sequence decodes one token a step, two steps in flight, 16-token blocks, prefix caching on. With
--speculate, n-grams are looked up: "new" text has none that occurred before, so that there is nothing to
draft; of "repeated" text all drafts come true, and each step waits for the result before it.
plan    Scheduler.plan: rows, blocks, the plan's bytes
send    writing the plan into the ring
commit  Scheduler.commit: tokens, stop checks, publishing of full blocks
total   their sum: host time per step (the wake-up by the eventfd and users' consumers come on top)
tokens  that the sequences get in a step, on average
"""

import argparse
import asyncio
import statistics
import struct
from array import array
from collections import deque
from time import perf_counter_ns, process_time_ns
from typing import NamedTuple

from asyncengine.engine.supervisor import WorkerGroup
from asyncengine.params import SamplingParams
from asyncengine.scheduling.scheduler import Scheduler
from asyncengine.scheduling.sequence import Sequence
from asyncengine.speculation import NgramSpeculation
from asyncengine.wire.plan import PLAN_HEADER, ROW_FIELDS, SAMPLE, VERIFY

BLOCK_SIZE = 16
PROMPT = 32
DEPTH = 2
DEVICE_US = 1_000_000  # what the worker claims: so long that drafts and waiting for them pay


class Echo:
    """A worker that answers every sample at once, in each step with another token."""

    def __init__(self, rank: int, world_size: int, fds: dict[str, int]) -> None:
        pass

    def run_stage(self, stage: str, payload: bytes, progress: object) -> bytes:
        return b""

    def step(self, plan: bytes) -> bytes:
        numbers = memoryview(plan[: len(plan) // 4 * 4]).cast("i")
        epoch, step, rows = numbers[:3]
        words = numbers[PLAN_HEADER : PLAN_HEADER + ROW_FIELDS * rows]
        flags = words[3::ROW_FIELDS]
        sampled = sum(flag & SAMPLE for flag in flags)
        if any(flag & VERIFY for flag in flags):
            counts = zip(words[2::ROW_FIELDS], flags, strict=True)
            sampled += sum(count - 1 for count, flag in counts if flag & VERIFY)
        tokens = array("i", [self.token(step)]) * sampled
        return struct.pack("<8i", epoch, step, sampled, 0, DEVICE_US, 0, 0, 0) + tokens.tobytes()

    def token(self, step: int) -> int:
        return step

    def close(self) -> None:
        pass


class Repeat(Echo):
    """The same token in each step."""

    def token(self, step: int) -> int:
        return 7


class Step(NamedTuple):
    plan: float
    send: float
    commit: float
    tokens: int


async def measure(running: int, steps: int, in_process: bool, text: str | None) -> tuple[list[Step], float]:
    """Times of each step and host CPU time per step, in microseconds. `text`: what is speculated on."""
    speculation = None if text is None else NgramSpeculation()
    worker = Repeat if text == "repeated" else Echo
    most = 1 + speculation.num_speculative_tokens if speculation is not None and worker is Repeat else 1
    length = PROMPT + most * (steps + 2 * PROMPT)
    scheduler = Scheduler(
        num_blocks=running * (length // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        max_num_seqs=running,
        max_num_batched_tokens=max(8192, running),
        max_model_len=length,
        eos_ids=[2],
        speculation=speculation,
    )
    params = SamplingParams(ignore_eos=True)
    for i in range(running):
        prompt = [i & 255, i >> 8, *range(PROMPT - 2)]
        scheduler.add([Sequence(str(i), prompt, params, seed=i, arrival=float(i))])

    results: deque[bytes] = deque()
    came = asyncio.Event()

    def on_result(data: bytes) -> None:
        results.append(data)
        came.set()

    workers = None
    if not in_process:
        workers = await WorkerGroup.start(
            1,
            on_result=on_result,
            on_death=lambda error: print(error),
            handler=f"step_overhead:{worker.__name__}",
        )
        await workers.run_stage("config", b"")
    echo = worker(0, 1, {})
    times: list[Step] = []
    cpu = process_time_ns()
    while len(times) < steps + PROMPT:
        if len(times) == PROMPT:
            cpu = process_time_ns()
        plan = send = 0  # a plan that was put off until a result comes counts too
        while scheduler.in_flight < DEPTH:
            t0 = perf_counter_ns()
            planned = scheduler.plan()
            t1 = perf_counter_ns()
            plan += t1 - t0
            if planned is None:
                break
            if workers is None:
                on_result(echo.step(planned.data))
                t2 = t1
            else:
                if not workers.send_plan(planned.data):
                    raise RuntimeError("the ring is full")
                t2 = perf_counter_ns()
            send += t2 - t1
        while not results:
            came.clear()
            await came.wait()
        t0 = perf_counter_ns()
        commit = scheduler.commit(results.popleft())
        t1 = perf_counter_ns()
        if len(commit.progressed) >= running or len(times) < PROMPT:
            times.append(Step(plan / 1e3, send / 1e3, (t1 - t0) / 1e3, len(commit.tokens)))
    cpu = process_time_ns() - cpu
    if workers is not None:
        await workers.stop()
    return times[PROMPT:], cpu / 1e3 / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=500, help="measured per row")
    parser.add_argument("--in-process", action="store_true", help="no ring and no worker: scheduler alone")
    parser.add_argument("--speculate", choices=["new", "repeated"], help="on such text; default: not at all")
    args = parser.parse_args()
    print("microseconds per step, median (99th percentile)")
    print(f"{'running':>8}{'plan':>16}{'send':>16}{'commit':>16}{'total':>16}{'host CPU':>10}{'tokens':>8}")
    for running in args.running:
        times, cpu = asyncio.run(measure(running, args.steps, args.in_process, args.speculate))
        *columns, tokens = zip(*times, strict=True)
        columns.append(tuple(sum(step[:3]) for step in times))
        cells = [
            f"{statistics.median(c):.1f} ({sorted(c)[int(0.99 * len(c))]:.0f})".rjust(16) for c in columns
        ]
        print(f"{running:>8}{''.join(cells)}{cpu:>10.1f}{statistics.fmean(tokens):>8.1f}")


if __name__ == "__main__":
    main()
