"""OpenVINO GenAI, continuous batching. Model: a directory of `optimum-cli export openvino`."""

from importlib import import_module
from typing import Any

from runner import Engine, serve


def start(job: dict[str, Any]) -> Engine:
    import numpy as np

    openvino: Any = import_module("openvino")
    genai: Any = import_module("openvino_genai")

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 4096
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": job["threads"]}
    pipe = genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", options)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return [list(r.m_generation_ids[0]) for r in pipe.generate(inputs, [config] * len(inputs))]

    return Engine(genai.__version__, generate)


if __name__ == "__main__":
    serve(start)
