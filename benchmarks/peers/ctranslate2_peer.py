"""CTranslate2. Model: a directory of `ct2-transformers-converter`, with the checkpoint's tokenizer files."""

import json
import os
from importlib import import_module
from typing import Any

from runner import Engine, serve


def start(job: dict[str, Any]) -> Engine:
    ctranslate2: Any = import_module("ctranslate2")

    compute = {"int8": "int8", "bf16": "bfloat16", "float32": "float32"}[job["precision"]]
    engine = ctranslate2.Generator(
        job["model"], device="cpu", compute_type=compute, intra_threads=job["threads"], inter_threads=1
    )
    # Its generator takes tokens as text; the vocabulary is in the order of the ids.
    with open(os.path.join(job["model"], "vocabulary.json")) as file:
        vocabulary = json.load(file)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        results = engine.generate_batch(
            [[vocabulary[i] for i in prompt] for prompt in prompts],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=0,
            end_token=[],
        )
        return [list(result.sequences_ids[0]) for result in results]

    return Engine(ctranslate2.__version__, generate)


if __name__ == "__main__":
    serve(start)
