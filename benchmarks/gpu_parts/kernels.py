"""Times of our kernels at Llama-3.1-8B's sizes, in bfloat16 with a cold L2 cache, as shares of what the GPU
gives at best: bytes that have to move at the measured bandwidth, operations at the matmul rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from asyncengine.kernels.activation import gated
from asyncengine.kernels.paged_attention import AttentionWorkspace, paged_attention
from asyncengine.kernels.rms_norm import add_rms_norm, rms_norm
from asyncengine.kernels.rope_kv import rope_kv
from asyncengine.kernels.sampler import Sampled, SamplerWorkspace, sample
from asyncengine.kernels.slot_params import RECORD_WORDS, pack_record

from .shapes import BANDWIDTH, FLOPS

__all__ = ["Case", "Step", "cases", "run"]

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 128256


class Case(NamedTuple):
    """One launch, and what it must do at least."""

    name: str
    launch: Callable[[], None]
    nbytes: int = 0
    flops: int = 0
    goal: str = ""


class Step:
    """Inputs of a step: sequences of `context` tokens, the last `new` of them of this step, on blocks in
    disorder."""

    def __init__(
        self,
        sequences: int,
        context: int,
        new: int,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int = HEAD_DIM,
    ) -> None:
        def ints(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device=device)

        per_sequence = -(-context // BLOCK_SIZE)
        blocks = sequences * per_sequence
        shape = (blocks, KV_HEADS, BLOCK_SIZE, head_dim)
        self.scale = head_dim**-0.5
        self.sequences, self.new, self.tokens = sequences, new, sequences * new
        self.k_cache = torch.randn(shape, dtype=dtype, device=device)
        self.v_cache = torch.randn(shape, dtype=dtype, device=device)
        self.qkv = torch.randn((self.tokens, (HEADS + 2 * KV_HEADS) * head_dim), dtype=dtype, device=device)
        self.out = torch.empty((self.tokens, HEADS * head_dim), dtype=dtype, device=device)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        self.block_table = ints(order.reshape(sequences, per_sequence))
        self.row_slot = ints(range(sequences))
        self.context_len = ints([context] * sequences)
        self.query_start = ints(range(0, self.tokens + 1, new))
        self.positions = ints(list(range(context - new, context)) * sequences)
        self.token_row = self.row_slot.repeat_interleave(new)
        self.rope = torch.randn((context, head_dim), dtype=torch.float32, device=device)

    def attention(self, workspace: AttentionWorkspace) -> None:
        paged_attention(
            self.qkv,
            self.k_cache,
            self.v_cache,
            self.query_start,
            self.context_len,
            self.row_slot,
            self.block_table,
            self.out,
            workspace,
            rows=range(self.sequences),
            max_query=self.new,
            scale=self.scale,
        )

    def rope_kv(self) -> None:
        rope_kv(
            self.qkv,
            self.rope,
            self.k_cache,
            self.v_cache,
            self.positions,
            self.token_row,
            self.context_len,
            self.row_slot,
            self.block_table,
        )


def cases(device: torch.device, dtype: torch.dtype, scale: int = 1) -> Any:
    """All cases, one at a time; sizes are divided by `scale`, for trials without a GPU."""
    programs = None if device.type == "cuda" else 4
    workspace = AttentionWorkspace.allocate(HEAD_DIM, device, programs)
    for batch in (1, 64, 256):
        batch, context = max(1, batch // scale), 1024 // scale
        step = Step(batch, context, 1, device, dtype)
        nbytes = 2 * batch * context * KV_HEADS * HEAD_DIM * step.k_cache.itemsize
        # One sequence alone is over in a few microseconds, most of them not spent on reading.
        goal = ">= 0.85" if batch > 1 else ""
        name = f"attention, decode {batch} x {context}"
        yield Case(name, lambda step=step: step.attention(workspace), nbytes=nbytes, goal=goal)
    for tokens in (1024 // scale, 8192 // scale):
        step = Step(1, tokens, tokens, device, dtype)
        flops = 2 * tokens**2 * HEADS * HEAD_DIM
        name = f"attention, prefill {tokens}"
        yield Case(name, lambda step=step: step.attention(workspace), flops=flops)
    for tokens in (256 // scale, 8192 // scale):
        yield from _elementwise(tokens, device, dtype)
    yield from _sampling(256 // scale, VOCAB // scale, device, dtype)


def _elementwise(tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
    x, residual, out = (torch.randn((tokens, HIDDEN), dtype=dtype, device=device) for _ in range(3))
    weight = torch.ones(HIDDEN, device=device)
    yield Case(f"RMS norm, {tokens}", lambda: rms_norm(out, x, weight, 1e-5), nbytes=2 * x.nbytes)
    name = f"residual and RMS norm, {tokens}"
    yield Case(name, lambda: add_rms_norm(out, residual, x, weight, 1e-5), nbytes=4 * x.nbytes)
    gate_up = torch.randn((tokens, 2 * INTERMEDIATE), dtype=dtype, device=device)
    product = gate_up[:, :INTERMEDIATE].contiguous()
    name = f"SiLU and product, {tokens}"
    yield Case(name, lambda: gated(product, gate_up), nbytes=3 * product.nbytes)
    step = Step(1, tokens, tokens, device, dtype)
    nbytes = 2 * step.qkv.nbytes + step.rope.nbytes
    yield Case(f"rotation and cache write, {tokens}", step.rope_kv, nbytes=nbytes)


def _sampling(rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Any:
    logits = torch.randn((rows, vocab), device=device).mul_(3).to(dtype)
    workspace = SamplerWorkspace.allocate(rows, vocab, device)
    out = Sampled.allocate(rows, 0, device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    last = torch.zeros(rows, dtype=torch.int32, device=device)
    settings: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature": {"temperature": 0.6},
        "top-k 50, top-p 0.9": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
    }
    for name, fields in settings.items():
        records = b"".join(pack_record(seed=row, **fields) for row in range(rows))
        params = torch.frombuffer(bytearray(records), dtype=torch.int32)
        params = params.reshape(rows, RECORD_WORDS).to(device)

        def launch(params: torch.Tensor = params) -> None:
            sample(logits, params, slots, slots, last, out, workspace)

        yield Case(f"sampler, {name}, {rows} x {vocab}", launch, nbytes=logits.nbytes)


def run(report: Any, measured: dict[str, float]) -> None:
    from .machine import median_ms

    for case in cases(torch.device("cuda"), torch.bfloat16):
        ms = median_ms(case.launch)
        floor = None
        if case.nbytes and BANDWIDTH in measured:
            floor = 1e3 * case.nbytes / (measured[BANDWIDTH] * 1e12)
        elif case.flops and FLOPS in measured:
            floor = 1e3 * case.flops / (measured[FLOPS] * 1e12)
        ratio = None if floor is None else floor / ms
        report.add(case.name, 1e3 * ms, "us", floor=floor and 1e3 * floor, ratio=ratio, goal=case.goal)
        del case  # its memory, before the next one's
