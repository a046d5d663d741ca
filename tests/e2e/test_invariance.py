"""What runs beside a request, and how the engine cuts its work, does not change the answer."""

import asyncio

import pytest

from asyncengine import AsyncLLM

from .prompts import PROMPTS

GREEDY = dict(max_tokens=20, temperature=0, ignore_eos=True)
SEEDED = dict(max_tokens=20, temperature=0.9, top_p=0.95, top_k=50, seed=1234, ignore_eos=True)
ENGINE = dict(dtype="float32", max_model_len=1024)


def ids(outputs):
    return [[o.token_ids for o in output.outputs] for output in outputs]


def generate(model, prompts, params, check=None, one_by_one=False, **engine):
    async def run():
        async with await AsyncLLM.create(model, **(ENGINE | engine)) as llm:
            if one_by_one:
                outputs = [await llm.generate(prompt, **params) for prompt in prompts]
            else:
                outputs = await llm.generate_many(prompts, **params)
            if check is not None:
                check(llm.metrics(), outputs)
            llm._core.scheduler.check()
            return ids(outputs)

    return asyncio.run(run())


@pytest.fixture(scope="module", params=["greedy", "seeded"])
def case(request, demo_gguf):
    params = GREEDY if request.param == "greedy" else SEEDED
    alone = generate(demo_gguf, PROMPTS, params, one_by_one=True, enable_prefix_caching=False)
    return demo_gguf, params, alone


def test_batch_of_64(case):
    model, params, alone = case
    many = (PROMPTS * 4)[:64]
    assert generate(model, many, params) == (alone * 4)[:64]


@pytest.mark.parametrize("chunk", [16, 512])
def test_chunk_size(case, chunk):
    model, params, alone = case
    assert generate(model, PROMPTS, params, max_num_batched_tokens=chunk, max_num_seqs=8) == alone


def test_prefix_cache(case):
    model, params, alone = case

    def hit(metrics, outputs):
        assert metrics["prefix_cache_hits_total"] > 0
        assert any(output.num_cached_tokens for output in outputs)

    many = PROMPTS * 2
    assert generate(model, many, params, check=hit, one_by_one=True, block_size=4) == alone * 2


def test_preemption(case):
    model, params, alone = case

    def preempted(metrics, outputs):
        assert metrics["num_preemptions_total"] > 0

    per_token = 2 * 30 * 3 * 64 * 4
    result = generate(
        model,
        PROMPTS,
        params,
        check=preempted,
        max_model_len=256,
        block_size=4,
        kv_cache_memory_bytes=per_token * 280,
    )
    assert result == alone


def test_eager(case):
    model, params, alone = case
    assert generate(model, PROMPTS, params, enforce_eager=True) == alone


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads(case, threads):
    model, params, alone = case
    assert generate(model, PROMPTS, params, num_threads=threads) == alone


def test_bfloat16_op_by_op_and_on_any_number_of_threads(demo_gguf):
    recorded = generate(demo_gguf, PROMPTS, GREEDY, dtype="bfloat16")
    for engine in ({"enforce_eager": True}, {"num_threads": 1}, {"num_threads": 3, "enforce_eager": True}):
        assert generate(demo_gguf, PROMPTS, GREEDY, dtype="bfloat16", **engine) == recorded, engine


def test_seeds_differ_and_unseeded_requests_differ(demo_gguf):
    seeds = [dict(SEEDED, seed=seed) for seed in (1, 2, 3)]

    async def run():
        async with await AsyncLLM.create(demo_gguf, **ENGINE) as llm:
            seeded = [ids([await llm.generate(PROMPTS[0], **params)]) for params in seeds]
            free = [ids([await llm.generate(PROMPTS[0], **dict(SEEDED, seed=None))]) for _ in range(3)]
            return seeded, free

    seeded, free = asyncio.run(run())
    assert len({str(s) for s in seeded}) == 3
    assert len({str(s) for s in free}) == 3


def test_first_of_several_completions_is_the_single_one(demo_gguf):
    async def run():
        async with await AsyncLLM.create(demo_gguf, **ENGINE) as llm:
            single = await llm.generate(PROMPTS[1], **SEEDED)
            four = await llm.generate(PROMPTS[1], n=4, **SEEDED)
            return ids([single])[0], ids([four])[0]

    single, four = asyncio.run(run())
    assert four[0] == single[0]
    assert len({tuple(o) for o in four}) == 4
