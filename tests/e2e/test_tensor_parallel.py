"""Several ranks give one rank's greedy ids in float32."""

import asyncio

import pytest

from asyncengine import AsyncLLM

from ..worker.tiny import make_model, prompt
from .prompts import PROMPTS

GREEDY = dict(max_tokens=24, temperature=0, ignore_eos=True)


def generate(model, prompts, ranks, params=GREEDY, **engine):
    async def run():
        async with await AsyncLLM.create(
            model, tensor_parallel_size=ranks, dtype="float32", max_model_len=160, **engine
        ) as llm:
            outputs = await llm.generate_many(prompts, **params)
            assert len(llm._core.workers.pids) == ranks
            return [output.outputs[0].token_ids for output in outputs]

    return asyncio.run(run())


def test_demo_model_on_three_ranks(demo_gguf):
    prompts = [p for p in PROMPTS if len(p) < 100]
    assert generate(demo_gguf, prompts, 3) == generate(demo_gguf, prompts, 1)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_tiny_models(tmp_path, architecture):
    """Four heads, two KV heads: on four ranks every KV head is held twice."""
    model = make_model(architecture, head_dim=16) if architecture == "Qwen3" else make_model(architecture)
    model.save_pretrained(tmp_path)
    prompts = [prompt(length) for length in (1, 5, 33, 90)]
    engine = dict(skip_tokenizer_init=True, max_num_batched_tokens=32, max_num_seqs=8)
    one = generate(tmp_path, prompts, 1, **engine)
    assert generate(tmp_path, prompts, 2, **engine) == one
    assert generate(tmp_path, prompts, 4, **engine) == one


def test_seeded_sampling_is_the_same_on_every_number_of_ranks(tmp_path):
    make_model("Llama").save_pretrained(tmp_path)
    params = dict(max_tokens=24, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2, ignore_eos=True)
    prompts = [prompt(length) for length in (18, 19, 20, 21)]
    one = generate(tmp_path, prompts, 1, params, skip_tokenizer_init=True)
    assert generate(tmp_path, prompts, 2, params, skip_tokenizer_init=True) == one
