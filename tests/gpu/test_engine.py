"""Whole engines on a GPU: the demo model beside transformers, graphs, sleep, offload, memory."""

import asyncio
import os

import pytest
import torch

from asyncengine import AsyncLLM, ConfigError, OutOfMemoryError
from asyncengine.gpus import visible_gpus

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time",
] * 2
GREEDY = dict(temperature=0, max_tokens=48, ignore_eos=True)
SMALL = dict(device="cuda", max_model_len=1024, max_num_seqs=16, kv_cache_memory_bytes=256 << 20)
MIB = 1 << 20


def run(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 200)

    return asyncio.run(bounded())


async def answers(llm, **fields):
    outputs = await llm.generate_many(PROMPTS, **(GREEDY | fields))
    return [output.outputs[0].token_ids for output in outputs]


async def answers_of(model, fields=None, **engine):
    async with await AsyncLLM.create(model, **(SMALL | engine)) as llm:
        assert llm.config.device == "cuda"
        return await answers(llm, **(fields or {}))


@pytest.fixture(scope="module")
def reference(device, demo_gguf):
    """`margins(prompt, ids, dtype)`: by how much transformers, in float32, likes its own choice better than
    each of `ids`, in logits."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    directory, file = os.path.split(demo_gguf)
    options = {"gguf_file": file, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # earlier versions always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    loaded = loaded.eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=file)

    def margins(prompt, ids):
        known = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            logits = loaded(torch.tensor([known + ids], device=device)).logits[0, len(known) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids, device=device)[:, None])[:, 0]
        return (logits.max(dim=1).values - chosen).tolist()

    return margins


# Each token is, but for rounding, what transformers would choose after those before it; by induction the text
# is its greedy continuation. The margins are in logits, whose spread is several units.
@pytest.mark.parametrize(
    ("engine", "margin"),
    [
        ({"dtype": "float32"}, 2e-3),
        ({"dtype": "float32", "enforce_eager": True}, 2e-3),
        ({"dtype": "bfloat16"}, 0.5),
        ({"dtype": "float16"}, 0.1),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, 1.5),
        ({"dtype": "float32", "block_size": 16, "max_num_batched_tokens": 16}, 2e-3),
    ],
    ids=str,
)
def test_greedy_ids_are_those_of_transformers(reference, demo_gguf, engine, margin):
    for prompt, ids in zip(PROMPTS, run(answers_of(demo_gguf, **engine)), strict=True):
        assert len(ids) == GREEDY["max_tokens"]
        assert max(reference(prompt, ids)) < margin


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}], ids=["greedy", "drawn"]
)
def test_graphs_and_eager_steps_give_the_same(device, demo_gguf, fields):
    # As many sequences as a graph has rows: the same matrix products in both.
    graphs = run(answers_of(demo_gguf, fields, dtype="float32", max_num_seqs=8))
    assert graphs == run(answers_of(demo_gguf, fields, dtype="float32", max_num_seqs=8, enforce_eager=True))


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_and_answers_stay(device, demo_gguf, level):
    async def scenario():
        async with await AsyncLLM.create(demo_gguf, dtype="float32", **SMALL) as llm:
            expected = await answers(llm)
            before = torch.cuda.mem_get_info(device)[0]
            for _ in range(2):
                await llm.sleep(level)
                given = torch.cuda.mem_get_info(device)[0] - before
                assert given > 200 * MIB + 500 * MIB  # keys and values, and 135 M weights of 4 bytes
                await llm.wake_up()
                assert await answers(llm) == expected

    run(scenario())


def test_offloaded_weights_give_the_same_answers(device, demo_gguf):
    async def scenario():
        plain, offloaded = {}, {}
        for found, gib in ((plain, 0), (offloaded, 0.2)):
            async with await AsyncLLM.create(demo_gguf, dtype="float32", cpu_offload_gb=gib, **SMALL) as llm:
                found["ids"] = await answers(llm)
                found["weights"] = {stage.name: stage.bytes for stage in llm.startup.stages}["load"]
        assert offloaded["ids"] == plain["ids"]
        assert plain["weights"] - offloaded["weights"] > 150 * MIB

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"gpu_memory_utilization": 0.0001}, "raise gpu_memory_utilization"),
        ({"kv_cache_memory_bytes": 1 << 50}, "lower it to"),
    ],
)
def test_impossible_settings_leave_the_gpu_as_it_was(device, demo_gguf, fields, remedy):
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    options = {"device": "cuda", "max_model_len": 1024} | fields
    with pytest.raises(OutOfMemoryError, match=remedy):
        run(AsyncLLM.create(demo_gguf, **options))
    assert torch.cuda.mem_get_info(device)[0] > before - 64 * MIB


def test_kv_cache_is_what_utilization_leaves(device, demo_gguf):
    """The whole engine, its CUDA context included, keeps to its share."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = 0.3

    async def scenario():
        options = {"device": "cuda", "max_model_len": 1024, "gpu_memory_utilization": share}
        async with await AsyncLLM.create(demo_gguf, **options) as llm:
            await answers(llm)
            return free - torch.cuda.mem_get_info(device)[0]

    taken = run(scenario())
    # A context takes a few hundred MiB; it is there before the engine looks how much is free.
    assert share * total - 2048 * MIB < taken < share * total + 1024 * MIB


def test_the_driver_and_torch_agree_on_the_gpus(device):
    assert len(visible_gpus()) == torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(device)
    assert max(gpu.capability for gpu in visible_gpus()) >= 10 * major + minor


def test_what_is_not_served_on_a_gpu_says_so(device, demo_gguf):
    for fields in ({"quantization": "int8"}, {"speculative": {"method": "ngram"}}):
        with pytest.raises(ConfigError, match="device='cpu'"):
            run(AsyncLLM.create(demo_gguf, device="cuda", **fields))


def test_three_gpus(device, demo_gguf):
    if torch.cuda.device_count() < 3:
        pytest.skip("the demo model divides by 3")
    one = run(answers_of(demo_gguf, dtype="float32"))
    assert run(answers_of(demo_gguf, dtype="float32", tensor_parallel_size=3)) == one
