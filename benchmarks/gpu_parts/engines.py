"""Our engine with dummy weights of a model's real shape: start, decode steps, prefill, a mixed workload."""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from struct import unpack_from
from typing import Any, NamedTuple

from asyncengine import AsyncLLM, SamplingParams

from .shapes import BANDWIDTH, FLOPS, NANO_TOKENS, SHAPES, Floor, nano_vllm, prompt

__all__ = ["Steps", "floor_of", "llama", "measure_decode", "measure_prefill", "open_engine", "qwen", "steady"]

CONTEXT = 1024
BATCHES = (1, 64, 256)
NEW = 128
START_SECONDS = 20


def llama(report: Any, measured: dict[str, float]) -> None:
    asyncio.run(_run(report, "Llama-3.1-8B", measured))


def qwen(report: Any, measured: dict[str, float]) -> None:
    asyncio.run(_run(report, "Qwen3-0.6B", measured))


async def _run(report: Any, name: str, measured: dict[str, float]) -> None:
    floor = floor_of(SHAPES[name], measured)
    async with open_engine(SHAPES[name], device="cuda", max_num_seqs=256, max_model_len=16384) as llm:
        for stage in llm.startup.stages:
            report.add(f"start: {stage.name}", stage.seconds, "s")
        ratio = llm.startup.seconds / START_SECONDS
        report.add("start", llm.startup.seconds, "s", floor=None, ratio=ratio, goal="<= 1.0")
        report.add("KV blocks", llm.startup.num_blocks, "blocks")
        await measure_prefill(report, llm, floor, (1024, 8192))
        for batch in BATCHES:
            await measure_decode(report, llm, floor, batch, CONTEXT, NEW)
        if name == "Qwen3-0.6B":
            await _nano_vllm(report, llm)


def floor_of(shape: dict[str, Any], measured: dict[str, float]) -> Floor | None:
    """None where the machine's rates are not known."""
    if BANDWIDTH not in measured or FLOPS not in measured:
        return None
    return Floor(shape, measured[BANDWIDTH] * 1e12, measured[FLOPS] * 1e12)


@asynccontextmanager
async def open_engine(shape: dict[str, Any], **engine: Any) -> AsyncIterator[AsyncLLM]:
    """An engine with dummy weights of `shape`, a Hugging Face configuration; prompts are ids."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}
        async with await AsyncLLM.create(folder, **(options | engine)) as llm:
            yield llm


class Step(NamedTuple):
    """A result as the host got it."""

    at: float
    """Seconds."""
    samples: int
    device: float
    """Seconds that the device was at work on it, by its own clock."""


class Steps:
    """Every result of an engine while it is open."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._core = llm._core
        self.steps: list[Step] = []

    def __enter__(self) -> "Steps":
        commit = self._core.on_result

        def on_result(data: bytes) -> None:
            _, _, samples, _, spent = unpack_from("<5i", data)
            self.steps.append(Step(time.perf_counter(), samples, spent * 1e-6))
            commit(data)

        # An attribute of the instance hides the method until it is deleted.
        self._core.on_result = on_result  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._core.on_result


class Steady(NamedTuple):
    """Decode steps of a whole batch, seconds each."""

    step: float
    """From result to result, mean."""
    device: float
    """Median of the device's own times."""
    idle: float
    """Share of the time in which the device was not at work on a step."""
    first: int
    """How many steps with the whole batch came before them."""


def steady(steps: Sequence[Step], batch: int) -> Steady:
    """The steps in which all of `batch` sequences decode, but for a few at both ends."""
    full = [step for step in steps if step.samples == batch]
    margin = max(1, len(full) // 16)
    kept = full[margin:-margin]
    if len(kept) < 8:
        raise ValueError(f"only {len(full)} of {len(steps)} steps had all {batch} sequences")
    span = kept[-1].at - kept[0].at
    return Steady(
        span / (len(kept) - 1),
        statistics.median(step.device for step in kept[1:]),
        max(0.0, 1 - sum(step.device for step in kept[1:]) / span),
        margin,
    )


async def measure_decode(
    report: Any, llm: AsyncLLM, floor: Floor | None, batch: int, context: int, new: int
) -> None:
    prompts = [prompt(number, context) for number in range(batch)]
    with Steps(llm) as watched:
        begin = time.perf_counter()
        outputs = await llm.generate_many(prompts, max_tokens=new, temperature=0, ignore_eos=True)
        seconds = time.perf_counter() - begin
    _check(outputs, [new] * batch)
    found = steady(watched.steps, batch)
    least = None if floor is None else floor.decode(batch, context + new / 2)
    name = f"{batch} x {context}"
    report.add(
        f"decode step, {name}",
        1e3 * found.step,
        "ms",
        floor=None if least is None else 1e3 * least,
        ratio=None if least is None else found.step / least,
        goal="<= 1.2",
    )
    report.add(f"device time of a decode step, {name}", 1e3 * found.device, "ms")
    report.add(f"idle between steps, {name}", 100 * found.idle, "%", ratio=found.idle, goal="<= 0.03")
    report.add(f"offline, {name} in, {new} out", batch * new / seconds, "tok/s")


async def measure_prefill(report: Any, llm: AsyncLLM, floor: Floor | None, lengths: Sequence[int]) -> None:
    for number, length in enumerate(lengths):
        best = device = float("inf")
        for attempt in range(4):  # the first one compiles
            with Steps(llm) as watched:
                begin = time.perf_counter()
                ids = prompt(1000 + 10 * number + attempt, length)
                await llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True)
                best = min(best, time.perf_counter() - begin)
            device = min(device, sum(step.device for step in watched.steps))
        least = None if floor is None else floor.prefill(length)
        report.add(
            f"prefill of {length}",
            1e3 * device,
            "ms",
            floor=None if least is None else 1e3 * least,
            ratio=None if least is None else least / device,
            goal=">= 0.7",
        )
        report.add(f"time to first token, {length} in", 1e3 * best, "ms")


async def _nano_vllm(report: Any, llm: AsyncLLM) -> None:
    requests = nano_vllm()
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=r.max_tokens) for r in requests]
    with Steps(llm) as watched:
        begin = time.perf_counter()
        outputs = await llm.generate_many([r.prompt for r in requests], params)
        seconds = time.perf_counter() - begin
    _check(outputs, [r.max_tokens for r in requests])
    report.add("nano-vllm's workload", seconds, "s", ratio=seconds, goal="<= 5.0")
    report.add("nano-vllm's workload, output", NANO_TOKENS / seconds, "tok/s")
    idle = 1 - sum(step.device for step in watched.steps) / seconds
    report.add("nano-vllm's workload, idle", 100 * idle, "%")


def _check(outputs: Sequence[Any], lengths: Sequence[int]) -> None:
    found = [len(output.outputs[0].token_ids) for output in outputs]
    if found != list(lengths):
        raise ValueError("the engine gave other numbers of tokens than were asked for")
