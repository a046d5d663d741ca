"""Where a step of the CPU's program spends its time, and how near it is to what the machine can do.

    python benchmarks/cpu_step.py [--dtype bfloat16] [--quantization int8] [--batch 1,8,32] [--context 192]
        [--prefill 1024] [--threads N]

Runs the worker's own step program in this process, without the host, over the demo model or `--model`, a
GGUF file. The floor of a step is the larger of two times: its weights, keys and values at the bandwidth of
memory, and its operations at the peaks of arithmetic. A shared machine's speed drifts: the peaks are measured
right before and right after the steps of each shape, and the better of the two counts. Printed are the best
and the median step, and what share of each is the floor; then both measurements of every peak: where these
are far apart, the shape was caught in a change of speed and is better measured again.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec import msgpack

from asyncengine._fast import cpu
from asyncengine.checkpoint.demo import demo_model
from asyncengine.checkpoint.gguf import GGUFFile
from asyncengine.checkpoint.gguf_spec import spec_from_gguf
from asyncengine.cores import usable_cores
from asyncengine.wire.plan import PLAN_HEADER
from asyncengine.wire.stages import Allocate, WorkerConfig
from asyncengine.worker.ops.cpu import Code, Operation, Rows
from asyncengine.worker.runner import Runner

BLOCK = 32
TRIES = 6
"""Of each peak, before and after a shape: about 0.2 s together with the memory that is read."""
TYPES = {getattr(cpu, name): name for name in ("F32", "BF16", "F16", "Q16", "Q8", "Q4", "I8")}
UNITS = {
    "F32": ("f32", 1),
    "F16": ("f32", 1),
    "BF16": ("bf16", 1),
    "Q16": ("int8", 3),
    "Q8": ("int8", 1),
    "Q4": ("int8", 1),
}
"""Of a type of weights: what is multiplied, and how many products stand for one."""


def start(args: argparse.Namespace) -> Runner:
    path = args.model or demo_model()
    with_file = GGUFFile(path)
    config = WorkerConfig(
        spec=spec_from_gguf(with_file),
        weights=path,
        load_format="gguf",
        device="cpu",
        dtype=args.dtype,
        quantization=args.quantization,
        kv_dtype=args.kv_dtype or args.dtype,
        block_size=BLOCK,
        max_model_len=2048,
        max_num_seqs=max(args.batch),
        max_num_samples=max(args.batch),
        max_logprobs=0,
        max_num_batched_tokens=max(args.prefill, *args.batch),
        num_threads=args.threads or usable_cores(),
        enforce_eager=False,
        seed=0,
    )
    runner = Runner(0, 1, {})
    runner.run_stage("config", msgpack.encode(config), lambda *_: None)
    runner.run_stage("load", b"", lambda *_: None)
    runner.run_stage("profile", b"", lambda *_: None)
    blocks = max(args.batch) * (args.context // BLOCK + 2) + args.prefill // BLOCK + 1
    runner.run_stage("allocate", msgpack.encode(Allocate(blocks)), lambda *_: None)
    runner.run_stage("capture", b"", lambda *_: None)
    return runner


def plan(rows: list[tuple[int, int, int]]) -> bytes:
    """Rows of (slot, start, count), each sampled, tokens inline; every slot has blocks of its own."""
    words: list[int] = []
    updates: list[int] = []
    tokens: list[int] = []
    block = 0
    for slot, start, count in rows:
        words += [slot, start, count, 1]
        for index in range((start + count - 1) // BLOCK + 1):
            updates += [slot, index, block]
            block += 1
        tokens += [(slot * 7 + i * 13) % 40000 + 100 for i in range(count)]
    header = [0, 1, len(rows), len(tokens), len(updates) // 3, 0, 0, 0]
    assert len(header) == PLAN_HEADER
    return np.array(header + words + updates + tokens, np.int32).tobytes()


def work(operation: Operation, rows: list[tuple[int, int, int]]) -> tuple[int, str, int]:
    """What no implementation of an operation can avoid: bytes of weights or of keys and values, each once;
    and the peak that bounds its arithmetic, with the number of operations. Activations are left out: they
    stay in the caches."""
    n = operation.n
    if operation.code in (Code.LINEAR, Code.HEAD):
        dtype = TYPES[n[2]]
        if n[4] == cpu.COMPACT:
            nbytes = cpu.compact_bytes(operation.p[2], n[0])
        else:
            nbytes = cpu.packed_bytes(n[0], n[1], dtype, n[4], bool(n[5]))
        tokens = len(rows) if operation.rows == Rows.SAMPLES else sum(count for _, _, count in rows)
        unit, products = UNITS[dtype]
        return nbytes, unit, products * 2 * tokens * n[0] * n[1]
    if operation.code == Code.ATTENTION:
        q_heads, kv_heads, head_dim, _, block, kv_type, *_ = n
        position = 2 * cpu.kv_block_bytes(TYPES[kv_type], kv_heads, block, head_dim) // block
        seen = sum(count * start + count * (count + 1) // 2 for _, start, count in rows)
        # Numbers of the cache can be multiplied as what they are.
        unit = {"BF16": "bf16", "I8": "int8"}.get(TYPES[kv_type], "f32")
        return position * sum(start + count for _, start, count in rows), unit, 4 * seen * q_heads * head_dim
    return 0, "f32", 0


class Floor(NamedTuple):
    """Milliseconds."""

    memory: float
    """A step's bytes at the memory's bandwidth."""
    arithmetic: float
    """Its operations, each kind at its peak."""


def floor_of(
    operations: Sequence[Operation], rows: list[tuple[int, int, int]], peaks: dict[str, float]
) -> Floor:
    """What the operations need at the least, with peaks in units per second."""
    works = [work(operation, rows) for operation in operations]
    memory = sum(nbytes for nbytes, _, _ in works) / peaks["read"]
    arithmetic = sum(count / peaks[unit] for _, unit, count in works)
    return Floor(1000 * memory, 1000 * arithmetic)


class Measured(NamedTuple):
    steps: list[float]
    """Milliseconds of whole steps."""
    before: dict[str, float]
    after: dict[str, float]
    """Peaks in units per second."""
    spent: dict[str, float]
    """Milliseconds by kind of operation, when each runs as a call of its own."""


def measure(runner: Runner, rows: list[tuple[int, int, int]], repeats: int) -> Measured:
    backend, batch = runner.backend, runner._batch
    batch.prepare(plan(rows))
    runner._sampler.head_modes(batch.sample_slots, batch.sample_positions, backend.modes)
    before = cpu.peaks(backend.team, tries=TRIES)
    steps = []
    for _ in range(repeats):
        begin = time.perf_counter()
        backend.run(batch)
        steps.append(1000 * (time.perf_counter() - begin))
    after = cpu.peaks(backend.team, tries=TRIES)
    program, step = backend._program, backend._step
    # Pass after pass, so that each operation finds the caches as the others leave them.
    times = np.empty((max(3, repeats // 4), len(backend.operations)))
    for row in times:
        for index in range(len(row)):
            begin = time.perf_counter()
            program.run_op(index, step)
            row[index] = time.perf_counter() - begin
    spent: dict[str, float] = defaultdict(float)
    for operation, seconds in zip(backend.operations, np.median(times, axis=0), strict=True):
        spent[operation.code.name.lower()] += 1000 * float(seconds)
    return Measured(steps, before, after, dict(spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    numbers: Any = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=("gguf", "int8", "int4"))
    parser.add_argument("--kv-dtype")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    runner = start(args)
    shapes = {f"decode {n}": [(slot, args.context - 1, 1) for slot in range(n)] for n in args.batch}
    if args.prefill:
        shapes[f"prefill {args.prefill}"] = [(0, 0, args.prefill)]
    for name, rows in shapes.items():
        found = measure(runner, rows, args.repeats if "decode" in name else 5)
        peaks = {unit: max(found.before[unit], found.after[unit]) for unit in found.before}
        limits = floor_of(runner.backend.operations, rows, peaks)
        floor, best, median = max(limits), min(found.steps), float(np.median(found.steps))
        parts = "  ".join(f"{k} {v:.2f}" for k, v in sorted(found.spent.items(), key=lambda item: -item[1]))
        drift = "  ".join(
            f"{unit} {value / 1e9:.1f}, {found.after[unit] / 1e9:.1f}" for unit, value in found.before.items()
        )
        print(
            f"{name:<14}best {best:.2f} ms ({floor / best:.0%} of it the floor), median {median:.2f}"
            f" ({floor / median:.0%})   floor {floor:.2f}: memory {limits.memory:.2f},"
            f" arithmetic {limits.arithmetic:.2f}   {parts}\n{'':14}peaks before, after in G/s: {drift}",
            flush=True,
        )


if __name__ == "__main__":
    main()
