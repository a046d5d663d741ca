"""transformers' continuous batching on the workload that `llama` has measured, beside ours in one run.

Random weights of Llama-3.1-8B's shape, 64 prompts of 1,024 ids, 128 new ones each, greedy. Ours runs first,
and has gone before the other starts, so that both have the whole GPU.
"""

import asyncio
import time
from typing import Any

from .engines import CONTEXT, NEW, open_engine
from .shapes import LLAMA_8B, prompt

__all__ = ["run"]

BATCH = 64


def run(report: Any, measured: dict[str, float]) -> None:
    ours = asyncio.run(_ours())
    report.add("asyncengine", BATCH * NEW / ours, "tok/s")
    theirs = _transformers()
    report.add("transformers' continuous batching", BATCH * NEW / theirs, "tok/s")
    report.add("asyncengine / transformers", theirs / ours, "x", ratio=theirs / ours, goal=">= 3.0")


async def _ours() -> float:
    async with open_engine(LLAMA_8B, device="cuda", max_num_seqs=BATCH, max_model_len=4096) as llm:
        seconds = float("inf")
        for attempt in range(2):  # the first one compiles
            prompts = [prompt(BATCH * attempt + number, CONTEXT) for number in range(BATCH)]
            begin = time.perf_counter()
            await llm.generate_many(prompts, max_tokens=NEW, temperature=0, ignore_eos=True)
            seconds = min(seconds, time.perf_counter() - begin)
    return seconds


def _transformers() -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values = {key: value for key, value in LLAMA_8B.items() if key not in ("model_type", "torch_dtype")}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **values), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    generation = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    seconds = float("inf")
    for attempt in range(2):
        prompts = [prompt(BATCH * attempt + number, CONTEXT) for number in range(BATCH)]
        outputs = list(model.generate_batch(prompts, generation_config=generation).values())
        tokens = [len(output.generated_tokens) for output in outputs]
        if tokens != [NEW] * BATCH:
            raise ValueError(f"transformers gave {tokens} tokens, {BATCH} x {NEW} were asked for")
        # From the first request's start to the last one's end: without captures and other preparations.
        begins, ends = zip(*(output.lifespan for output in outputs), strict=True)
        seconds = min(seconds, max(ends) - min(begins))
    return seconds
