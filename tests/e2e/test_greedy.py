"""The demo model through the whole engine, against transformers."""

import asyncio

import pytest

from asyncengine import AsyncLLM

from . import oracle
from .prompts import PROMPTS

NEW = 64


def generate(model, prompts, params, **engine):
    async def run():
        async with await AsyncLLM.create(model, **engine) as llm:
            return await llm.generate_many(prompts, **params)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def greedy(demo_gguf):
    params = dict(max_tokens=NEW, temperature=0, ignore_eos=True)
    return generate(demo_gguf, PROMPTS, params, dtype="float32", max_model_len=2048)


def test_prompt_ids_are_the_reference_tokenizers(demo_gguf, greedy):
    tokenizer = oracle.tokenizer(demo_gguf)
    assert [o.prompt_token_ids for o in greedy] == [tokenizer(p)["input_ids"] for p in PROMPTS]


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_greedy_ids_equal_the_reference_in_float32(demo_gguf, greedy, index):
    output = greedy[index]
    assert len(output.outputs[0].token_ids) == NEW
    assert output.outputs[0].finish_reason == "length"
    oracle.assert_greedy(demo_gguf, output.prompt_token_ids, output.outputs[0].token_ids)


def test_text_is_the_reference_tokenizers(demo_gguf, greedy):
    tokenizer = oracle.tokenizer(demo_gguf)
    for output in greedy:
        ids = output.outputs[0].token_ids
        assert output.outputs[0].text == tokenizer.decode(ids, skip_special_tokens=True)


def test_bfloat16_logprobs(demo_gguf):
    """Against transformers in float32. The tolerance is the error of transformers' own bfloat16.

    That rounds every activation to 8 bits; here at least the sums between operations are float32.
    """
    params = dict(max_tokens=16, temperature=0, ignore_eos=True, logprobs=5)
    outputs = generate(demo_gguf, PROMPTS[:4], params, dtype="bfloat16", max_model_len=2048)
    ours, theirs = [], []
    for output in outputs:
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        exact = oracle.logprobs(demo_gguf, prompt, completion.token_ids)
        rounded = oracle.logprobs(demo_gguf, prompt, completion.token_ids, "bfloat16")
        for position, entry in enumerate(completion.logprobs):
            for token, found in entry.items():
                ours.append(abs(found.logprob - float(exact[position, token])))
                theirs.append(abs(float(rounded[position, token] - exact[position, token])))
    assert sum(ours) <= sum(theirs)
    assert quantile(ours, 0.99) <= quantile(theirs, 0.99)


def quantile(values, share):
    return sorted(values)[int(share * len(values))]


def test_float32_logprobs(demo_gguf):
    params = dict(max_tokens=12, temperature=0, ignore_eos=True, logprobs=5)
    outputs = generate(demo_gguf, PROMPTS[:6], params, dtype="float32", max_model_len=2048)
    for output in outputs:
        completion = output.outputs[0]
        reference = oracle.logprobs(demo_gguf, output.prompt_token_ids, completion.token_ids)
        total = 0.0
        for position, token in enumerate(completion.token_ids):
            entry = completion.logprobs[position]
            assert next(iter(entry)) == token
            ids = reference[position].topk(5).indices
            assert {t for t, found in entry.items() if found.rank <= 5} == set(ids.tolist())
            for other, found in entry.items():
                assert found.logprob == pytest.approx(float(reference[position, other]), abs=2e-3)
                assert found.rank == 1 + int((reference[position] > reference[position, other]).sum())
            total += entry[token].logprob
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-6)
