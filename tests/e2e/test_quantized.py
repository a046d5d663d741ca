"""Quantized engines on the demo model: they answer, repeat themselves whatever runs beside, stay small."""

import asyncio

import psutil
import pytest
import torch

from asyncengine import AsyncLLM, ConfigError

from ..codes import LAYOUTS
from ..worker.packed import Packed
from ..worker.tiny import prompt, reference_logits
from . import oracle
from .prompts import PROMPTS

MIB = 1 << 20
FORMATS = [
    {},
    {"quantization": "int8"},
    {"quantization": "int4"},
    {"kv_cache_dtype": "int8"},
    {"quantization": "gguf", "dtype": "float32"},
]
# Mean absolute error of the chosen tokens' logprobs. The file's own rounding is in the reference too; what
# is left is that of the activations, of 8 bits, and of int4's codes: half a nat on this small a model.
LIMITS = [0.12, 0.12, 0.6, 0.12, 0.12]


def name(engine):
    return "-".join(engine.values()) or "as-stored"


async def answers(llm, prompts, **params):
    outputs = await llm.generate_many(prompts, temperature=0, ignore_eos=True, **params)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("engine", "limit"), list(zip(FORMATS, LIMITS, strict=True)), ids=list(map(name, FORMATS))
)
def test_accuracy(demo_gguf, engine, limit):
    async def run():
        async with await AsyncLLM.create(demo_gguf, max_model_len=512, **engine) as llm:
            stream = llm.chat([{"role": "user", "content": "What is 2+2?"}], temperature=0, max_tokens=16)
            assert "4" in (await stream).outputs[0].text
            return await llm.generate_many(
                PROMPTS[:4], max_tokens=16, temperature=0, ignore_eos=True, logprobs=0
            )

    errors = []
    for output in asyncio.run(run()):
        completion = output.outputs[0]
        exact = oracle.logprobs(demo_gguf, output.prompt_token_ids, completion.token_ids)
        for position, (row, token) in enumerate(zip(exact, completion.token_ids, strict=True)):
            errors.append(abs(completion.logprobs[position][token].logprob - row[token].item()))
    assert sum(errors) / len(errors) < limit


@pytest.mark.parametrize("engine", FORMATS[:4], ids=list(map(name, FORMATS[:4])))
def test_company_changes_nothing(demo_gguf, engine):
    async def run(prompts, together, **more):
        async with await AsyncLLM.create(demo_gguf, max_model_len=512, **engine, **more) as llm:
            if together:
                return await answers(llm, prompts, max_tokens=12)
            return [(await answers(llm, [prompt], max_tokens=12))[0] for prompt in prompts]

    prompts = [prompt for prompt in PROMPTS if len(prompt) < 400]
    alone = asyncio.run(run(prompts, False, enable_prefix_caching=False))
    assert asyncio.run(run(prompts, True)) == alone
    assert asyncio.run(run(prompts, True, num_threads=1, max_num_seqs=3, max_num_batched_tokens=16)) == alone


@pytest.mark.parametrize("engine", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=name)
def test_worker_memory(demo_gguf, engine):
    """At rest: packed weights, touched KV and 80 MiB. While loading: 1.3 times the weights and 300 MiB."""

    async def run():
        async with await AsyncLLM.create(demo_gguf, max_model_len=2048, **engine) as llm:
            await llm.generate("Once upon a time", max_tokens=64, ignore_eos=True)
            weights = next(stage.bytes for stage in llm.startup.stages if stage.name == "load")
            (worker,) = psutil.Process().children()
            with open(f"/proc/{worker.pid}/status") as file:
                fields = dict(line.split(":", 1) for line in file)
            return weights, *(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))

    weights, now, peak = asyncio.run(run())
    kv = 68 * 2 * 30 * 3 * 64 * 2  # of the tokens computed, in bfloat16
    assert now < weights + kv + 80 * MIB
    assert peak < 1.3 * weights + 300 * MIB


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks(demo_gguf, ranks):
    """Every rank quantizes its own part; the answer stays."""

    async def run():
        async with await AsyncLLM.create(
            demo_gguf, quantization="int8", max_model_len=256, tensor_parallel_size=ranks
        ) as llm:
            stream = llm.generate("The capital of France is", max_tokens=4, temperature=0)
            return (await stream).outputs[0].text

    assert "Paris" in asyncio.run(run())


def test_gguf_codes_need_a_gguf_file(tmp_path):
    from ..worker.tiny import make_model

    make_model("Llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="needs a GGUF file; other checkpoints take 'int8' or 'int4'"):
        asyncio.run(AsyncLLM.create(tmp_path, skip_tokenizer_init=True, quantization="gguf"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_checkpoint(tmp_path, layout):
    """As stored; dequantized under a dtype; and the other formats are told apart."""
    packed = Packed("Llama", layout, 64, hidden_size=128, intermediate_size=384)
    packed.save(tmp_path)
    ids = prompt(30)

    async def run(**engine):
        engine |= dict(skip_tokenizer_init=True, max_model_len=64)
        async with await AsyncLLM.create(tmp_path, **engine) as llm:
            output = await llm.generate(ids, max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
            weights = next(stage.bytes for stage in llm.startup.stages if stage.name == "load")
            return output.outputs[0], weights

    errors, weights = {}, {}
    for name, engine in {
        "stored": {},
        "named": {"dtype": "float32", "quantization": layout},
        "plain": {"dtype": "float32"},
    }.items():
        completion, weights[name] = asyncio.run(run(**engine))
        exact = torch.from_numpy(reference_logits(packed.model, ids + completion.token_ids))
        exact = torch.log_softmax(exact, dim=-1)[len(ids) - 1 :]
        found = [completion.logprobs[i][token].logprob for i, token in enumerate(completion.token_ids)]
        expected = [exact[i, token].item() for i, token in enumerate(completion.token_ids)]
        errors[name] = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert errors["plain"] < 2e-3
    assert max(errors["stored"], errors["named"]) < 0.4
    assert weights["stored"] < 0.3 * weights["plain"]
    with pytest.raises(ConfigError, match="needs a GGUF file"):
        asyncio.run(run(quantization="gguf"))
    other = "awq" if layout == "gptq" else "gptq"
    with pytest.raises(ConfigError, match=f"needs a checkpoint quantized with {other}"):
        asyncio.run(run(quantization=other))
