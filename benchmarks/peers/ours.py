"""asyncengine. Model: a GGUF file. Precision: bf16, int8, int4, or gguf (as stored), with " kv8" behind it
where the KV cache is int8."""

import asyncio
from typing import Any

from runner import Engine, serve

ARGUMENTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "gguf": {},
}


def start(job: dict[str, Any]) -> Engine:
    import asyncengine

    weights, _, cache = job["precision"].partition(" ")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    llm = loop.run_until_complete(
        asyncengine.AsyncLLM.create(
            job["model"],
            num_threads=job["threads"],
            enable_prefix_caching=False,
            kv_cache_dtype="int8" if cache else "auto",
            **ARGUMENTS[weights],
        )
    )

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        done = llm.generate_many(prompts, max_tokens=new, temperature=0, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in loop.run_until_complete(done)]

    return Engine(asyncengine.__version__, generate, lambda: loop.run_until_complete(llm.aclose()))


if __name__ == "__main__":
    serve(start)
