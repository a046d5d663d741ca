"""The staged start: config, load, profile, allocate, capture.

Every stage reports progress and takes its time; what it has made is undone, in reverse, if a later one
fails. The workers hold all device state, so undoing their part is ending them.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from .._fast.cpu import Comm
from ..args import EngineArgs
from ..checkpoint.generation import generation_defaults
from ..checkpoint.hub import ModelFiles, resolve_model
from ..checkpoint.model import load_spec
from ..checkpoint.repository import OnProgress
from ..checkpoint.sharding import comm_region_bytes
from ..checkpoint.spec import ModelSpec
from ..config import EngineConfig, resolve
from ..errors import AsyncEngineError, EngineDeadError
from ..scheduling.scheduler import Scheduler
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import load_tokenizer
from ..wire.plan import Progress
from ..wire.stages import Allocate, Allocated, Captured, Loaded, Profiled, WorkerConfig
from .core import EngineCore
from .memory_plan import plan_blocks
from .supervisor import WorkerGroup

__all__ = ["ProgressEvent", "StageReport", "Started", "StartupReport", "start"]


SLOT_INIT_BYTES = 2048
"""Most bytes of a `SlotInit` without its history: nearly all are stop ids."""


class ProgressEvent(msgspec.Struct, frozen=True):
    """How far the start is. `total` is 0 where it is not known."""

    stage: str
    done: int
    total: int
    unit: str
    message: str


class StageReport(msgspec.Struct, frozen=True):
    """One stage: seconds it took, bytes it took on all ranks together."""

    name: str
    seconds: float
    bytes: int


class StartupReport(msgspec.Struct, frozen=True):
    """What the start did."""

    stages: tuple[StageReport, ...]
    num_blocks: int
    """KV blocks, each of `block_size` tokens."""
    operations: int
    """Operations of the captured step program; 0 when eager."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        rows = [f"  {s.name:<10}{s.seconds:8.3f} s {s.bytes / 2**20:12,.1f} MiB" for s in self.stages]
        return "\n".join([f"started in {self.seconds:.3f} s", *rows])


class Text(NamedTuple):
    """What the host holds of the model: how its text is made and read."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    sampling_defaults: dict[str, Any]


@dataclass
class Started:
    """What the start has made so far; complete when `start` returns it."""

    args: EngineArgs
    on_progress: Callable[[ProgressEvent], None] | None
    undo: AsyncExitStack
    files: ModelFiles = field(init=False)
    spec: ModelSpec = field(init=False)
    config: EngineConfig = field(init=False)
    text: Text = field(init=False)
    workers: WorkerGroup = field(init=False)
    core: EngineCore = field(init=False)
    report: StartupReport = field(init=False)
    num_blocks: int = field(init=False)
    operations: int = field(init=False)

    def progress(self, stage: str, done: int, total: int, unit: str, message: str = "") -> None:
        if self.on_progress is not None:
            self.on_progress(ProgressEvent(stage, done, total, unit, message or stage))

    async def run_stage(self, name: str, payload: bytes = b"") -> list[bytes]:
        """Runs one stage on all ranks; their answers in rank order."""
        ranks: dict[int, Progress] = {}

        def progress(rank: int, report: Progress) -> None:
            ranks[rank] = report
            done, total = sum(r.done for r in ranks.values()), sum(r.total for r in ranks.values())
            self.progress(name, done, total, report.unit)

        return await self.workers.run_stage(name, payload, progress)


async def start(args: EngineArgs, on_progress: Callable[[ProgressEvent], None] | None) -> Started:
    """Starts an engine. An error names the stage; everything that was made is undone."""
    async with AsyncExitStack() as undo:
        started = Started(args, on_progress, undo)
        reports = []
        for name, stage in _STAGES.items():
            begin = time.perf_counter()
            started.progress(name, 0, 0, "")
            try:
                taken = await stage(started)
            except AsyncEngineError as error:
                if not str(error).startswith("stage "):  # what a worker reports names it already
                    error.args = (f"stage {name!r} failed: {error}", *error.args[1:])
                raise
            started.progress(name, 1, 1, "stage")
            reports.append(StageReport(name, time.perf_counter() - begin, taken))
        started.report = StartupReport(tuple(reports), started.num_blocks, started.operations)
        started.undo = undo.pop_all()
        return started
    raise AssertionError("an exit stack does not swallow exceptions")


def _find(args: EngineArgs, on_progress: OnProgress) -> tuple[ModelFiles, ModelSpec, EngineConfig]:
    files = resolve_model(
        args.model,
        revision=args.revision,
        token=args.hf_token,
        download_dir=args.download_dir,
        load_format=args.load_format,
        on_progress=on_progress,
    )
    spec = load_spec(files, args.hf_overrides)
    return files, spec, resolve(args, spec, is_gguf=files.kind == "gguf")  # asks the driver: may take a while


async def _config(started: Started) -> int:
    """Finds the model, settles every setting, starts the workers."""
    args = started.args
    loop = asyncio.get_running_loop()

    def progress(done: int, total: int, unit: str) -> None:
        loop.call_soon_threadsafe(started.progress, "config", done, total, unit, "downloading")

    started.files, started.spec, config = await asyncio.to_thread(_find, args, progress)
    started.config = config
    fds = {}
    if config.tensor_parallel_size > 1:
        # Anonymous memory: nothing to clean up under /dev/shm, whatever happens. On CPUs the ranks exchange
        # data in it; on GPUs it is the empty file in which they find each other.
        name = "comm" if config.device == "cpu" else "rendezvous"
        fds[name] = os.memfd_create(f"asyncengine-{name}", os.MFD_CLOEXEC)
        started.undo.callback(os.close, fds[name])
        if config.device == "cpu":
            size = Comm.bytes_needed(config.tensor_parallel_size, comm_region_bytes(started.spec))
            os.ftruncate(fds[name], size)
    started.workers = await WorkerGroup.start(
        config.tensor_parallel_size,
        ring_capacity=_ring_capacity(config),
        on_result=lambda data: started.core.on_result(data),
        on_death=lambda error: _on_death(started, error),
        extra_fds=fds,
    )
    started.undo.push_async_callback(started.workers.stop)
    await started.run_stage("config", msgspec.msgpack.encode(_worker_config(started)))
    return 0


def _on_death(started: Started, error: EngineDeadError) -> None:
    if hasattr(started, "core"):
        started.core.die(error)


def _ring_capacity(config: EngineConfig) -> int:
    """Twice the largest plan, laid out as in `wire.plan`: the sequences that enter in one plan have at most
    `known` tokens, each with an entry of the block table and of the penalties' history at worst."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    known = max(config.max_model_len, tokens)
    rows = 16 * seqs + 4 * tokens
    updates = 12 * (known // config.block_size + tokens // config.block_size + 3 * seqs)
    inits = 5 * known + SLOT_INIT_BYTES * seqs
    return 2 * (rows + updates + inits) + (1 << 20)


def _worker_config(started: Started) -> WorkerConfig:
    config = started.config
    return WorkerConfig(
        spec=started.spec,
        weights=started.files.weights,
        load_format=started.files.kind,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_dtype=config.kv_dtype,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_samples=config.max_num_samples,
        max_logprobs=config.max_logprobs,
        num_threads=config.num_threads,
        enforce_eager=config.enforce_eager,
        seed=config.seed,
        cpu_offload_bytes=config.cpu_offload_bytes,
    )


async def _load(started: Started) -> int:
    """Weights in the workers, the tokenizer here, at the same time."""
    text = asyncio.ensure_future(asyncio.to_thread(_load_text, started.args, started.files))
    try:
        replies = await started.run_stage("load")
        started.text = await text
    finally:
        text.cancel()
    return sum(msgspec.msgpack.decode(reply, type=Loaded).weight_bytes for reply in replies)


def _load_text(args: EngineArgs, files: ModelFiles) -> Text:
    directory = files.directory if args.generation_config == "auto" else args.generation_config
    defaults = {} if args.generation_config == "vllm" else generation_defaults(directory)
    if args.skip_tokenizer_init:
        return Text(None, None, defaults)
    source = args.tokenizer or files.gguf_path or files.directory
    tokenizer = load_tokenizer(
        source,
        trust_remote_code=args.trust_remote_code,
        revision=args.tokenizer_revision,
        token=args.hf_token,
        download_dir=args.download_dir,
    )
    template = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate.for_tokenizer(tokenizer, tokenizer.chat_template)
        template.compile()
    return Text(tokenizer, template, defaults)


async def _profile(started: Started) -> int:
    """What a step needs, what memory is left, and how many KV blocks that makes."""
    replies = await started.run_stage("profile")
    profiles = [msgspec.msgpack.decode(reply, type=Profiled) for reply in replies]
    config = started.config
    fixed = started.args.max_model_len is not None
    started.num_blocks = plan_blocks(config, profiles, fixed_length=fixed)
    capacity = started.num_blocks * config.block_size
    if capacity < config.max_model_len:
        started.config = msgspec.structs.replace(config, max_model_len=capacity)
    return sum(profile.activation_bytes for profile in profiles)


async def _allocate(started: Started) -> int:
    """KV memory in the workers, the scheduler's tables here."""
    replies = await started.run_stage("allocate", msgspec.msgpack.encode(Allocate(started.num_blocks)))
    config = started.config
    eos_ids = started.spec.eos_token_ids
    tokenizer = started.text.tokenizer
    if not eos_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos_ids = (tokenizer.eos_token_id,)
    scheduler = Scheduler(
        eos_ids=eos_ids,
        num_blocks=started.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        policy=config.scheduling_policy,  # type: ignore[arg-type]
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        speculation=config.speculative,
    )
    started.core = EngineCore(scheduler, started.workers)
    return sum(msgspec.msgpack.decode(reply, type=Allocated).kv_bytes for reply in replies)


async def _capture(started: Started) -> int:
    """The model's forward, recorded as a program of native operations."""
    replies = [msgspec.msgpack.decode(r, type=Captured) for r in await started.run_stage("capture")]
    started.operations = replies[0].operations
    return sum(reply.program_bytes for reply in replies)


_STAGES: dict[str, Callable[[Started], Awaitable[int]]] = {
    "config": _config,
    "load": _load,
    "profile": _profile,
    "allocate": _allocate,
    "capture": _capture,
}
