"""Launches at representative sizes, by which tune.py chooses configurations. In bfloat16; on the device
`meta` they can be bound and recorded, but not run."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from asyncengine.kernels.activation import gated
from asyncengine.kernels.batch_update import DeviceBatch, batch_update
from asyncengine.kernels.paged_attention import AttentionWorkspace
from asyncengine.kernels.rms_norm import add_rms_norm
from asyncengine.kernels.sampler import Sampled, SamplerWorkspace, sample
from asyncengine.kernels.slot_params import RECORD_WORDS, pack_record

from .kernels import BLOCK_SIZE, HIDDEN, INTERMEDIATE, VOCAB, Step
from .shapes import QWEN3_06B

__all__ = [
    "Workload",
    "activation",
    "batch_updates",
    "decode",
    "norm",
    "prefill",
    "rotation",
    "sampling",
]

DTYPE = torch.bfloat16


class Workload(NamedTuple):
    name: str
    bind: Callable[[], Callable[[], None]]
    """Allocates what depends on the configuration in force and gives the launch."""
    written: tuple[torch.Tensor, ...]
    """All that the launch writes and that is to be the same in all configurations."""
    slack: float = 0.0
    """Share of integers that may differ all the same: ids at a cut that sums of other order shift."""


def norm(device: torch.device) -> Iterator[Workload]:
    for rows, width in ((64, QWEN3_06B["hidden_size"]), (256, HIDDEN), (8192, HIDDEN)):
        x, residual, out = (torch.randn((rows, width), dtype=DTYPE, device=device) for _ in range(3))
        weight = torch.ones(width, dtype=DTYPE, device=device)

        def launch(out: Any = out, residual: Any = residual, x: Any = x, weight: Any = weight) -> None:
            add_rms_norm(out, residual, x, weight, 1e-5)

        yield Workload(f"{rows} x {width}", lambda launch=launch: launch, (out, residual))


def activation(device: torch.device) -> Iterator[Workload]:
    for rows, width in ((64, QWEN3_06B["intermediate_size"]), (256, INTERMEDIATE), (8192, INTERMEDIATE)):
        gate_up = torch.randn((rows, 2 * width), dtype=DTYPE, device=device)
        out = torch.empty((rows, width), dtype=DTYPE, device=device)

        def launch(out: Any = out, gate_up: Any = gate_up) -> None:
            gated(out, gate_up)

        yield Workload(f"{rows} x {width}", lambda launch=launch: launch, (out,))


def rotation(device: torch.device) -> Iterator[Workload]:
    for sequences, context, new in ((64, 1024, 1), (256, 256, 1), (1, 8192, 8192)):
        step = Step(sequences, context, new, device, DTYPE)
        name = f"{sequences} x {new} at {context}"
        yield Workload(name, lambda step=step: step.rope_kv, (step.qkv, step.k_cache, step.v_cache))


def batch_updates(device: torch.device) -> Iterator[Workload]:
    """256 decode rows of which 4 begin a block, and 8 prompts of 1,024 tokens that enter."""
    for rows, count, updates, relayed in ((256, 1, 4, True), (8, 1024, 8 * 1024 // BLOCK_SIZE, False)):
        slots, tokens, stride = 256, max(256, rows * count), 2048 // BLOCK_SIZE
        ids = [] if relayed else [7] * tokens
        # Plans are laid out in asyncengine/wire/plan.py.
        plan = [0, 0, rows, len(ids), updates, 0, 0, 0]
        for row in range(rows):
            plan += [row, 1023 if relayed else 0, count, 3 if relayed else 1]
        for i in range(updates):
            plan += [i % rows, i // rows, i]
        batch = DeviceBatch.zeros(slots, stride, tokens, device)
        words = torch.as_tensor(plan + ids, dtype=torch.int32, device=device)

        def launch(batch: DeviceBatch = batch, words: torch.Tensor = words, rows: int = rows) -> None:
            batch_update(batch, words, rows)

        yield Workload(f"{rows} rows of {count}", lambda launch=launch: launch, tuple(batch))


def sampling(device: torch.device) -> Iterator[Workload]:
    settings: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 0.6},
        "top-p 0.9": {"temperature": 0.6, "top_p": 0.9},
        "top-k 50, top-p 0.9": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
    }
    for rows in (16, 256):
        logits = torch.randn((rows, VOCAB), device=device).mul_(3).to(DTYPE)
        slots = torch.arange(rows, dtype=torch.int32, device=device)
        for name, fields in settings.items():
            records = b"".join(pack_record(seed=row, **fields) for row in range(rows))
            params = torch.frombuffer(bytearray(records), dtype=torch.int32)
            params = params.reshape(rows, RECORD_WORDS).to(device)
            last = torch.zeros(rows, dtype=torch.int32, device=device)
            out = Sampled.allocate(rows, 0, device)

            def bind(
                logits: Any = logits,
                params: Any = params,
                slots: Any = slots,
                last: Any = last,
                out: Any = out,
            ) -> Callable[[], None]:
                workspace = SamplerWorkspace.allocate(*logits.shape, device)
                return lambda: sample(logits, params, slots, slots, last, out, workspace)

            yield Workload(f"{name}, {rows} x {VOCAB}", bind, (out.tokens, last), slack=0.04)


def decode(head_dim: int, device: torch.device) -> Iterator[Workload]:
    """The last one has more than 16 query tokens times heads per KV head."""
    for sequences, context, new in ((1, 4096, 1), (16, 4096, 1), (128, 1024, 1), (32, 1024, 6)):
        yield _attention(sequences, context, new, head_dim, device)


def prefill(head_dim: int, device: torch.device) -> Iterator[Workload]:
    """The last one has short tiles."""
    for sequences, context, new in ((1, 1024, 1024), (1, 8192, 8192), (4, 2048, 512), (32, 1024, 12)):
        yield _attention(sequences, context, new, head_dim, device)


def _attention(sequences: int, context: int, new: int, head_dim: int, device: torch.device) -> Workload:
    step = Step(sequences, context, new, device, DTYPE, head_dim)

    def bind() -> Callable[[], None]:
        programs = None if device.type == "cuda" else 4
        workspace = AttentionWorkspace.allocate(head_dim, device, programs)
        return lambda: step.attention(workspace)

    return Workload(f"{sequences} x {new} at {context}", bind, (step.out,))
