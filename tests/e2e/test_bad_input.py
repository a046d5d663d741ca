"""Whatever a caller passes: a clear error of the right class, nothing queued, nobody else disturbed."""

import asyncio
import json
import math
import threading

import pytest

from asyncengine import (
    AsyncLLM,
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryError,
    QueueFullError,
    SamplingParams,
)

from .harness import house, settle

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def h(demo_gguf):
    with house(demo_gguf, dtype="float32", max_model_len=512, max_num_seqs=4, max_queued_requests=4) as made:
        yield made


BAD_FIELDS = [
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", -0.1),
    ("temperature", 1e9),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", math.nan),
    ("presence_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -math.inf),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.nan),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("max_tokens", 2**63),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 2**31),
    ("n", 0),
    ("n", 2**31),
    ("n", 2**63),
    ("stop", ""),
    ("stop", ["a", 1]),
    ("stop", ["x"] * 1000),
    ("stop", "x" * 100_000),
    ("stop_token_ids", [49152]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", [2**63]),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", list(range(10_000))),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", 2**31),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("prompt_logprobs", 0),
    ("logit_bias", {1: 1.0}),
    ("allowed_token_ids", [1]),
    ("bad_words", ["x"]),
    ("structured_outputs", {"json": "{}"}),
    ("spaces_between_special_tokens", False),
    ("nonsense", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda v: str(v)[:20])
def test_sampling_field(h, name, value):
    async def run():
        neighbour = h.llm.generate(PROMPT, max_tokens=5, temperature=0)
        with pytest.raises(InvalidRequestError) as caught:
            h.llm.generate(PROMPT, **{name: value})
        assert caught.value.parameter == name
        assert name in str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert len((await neighbour).outputs[0].token_ids) == 5

    h.run(run())


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"),
        ([], "empty"),
        ([0, 49152], "49152"),
        ([-1], "-1"),
        ([2**31], str(2**31)),
        ([2**63], str(2**63)),
        ([1, "a"], "'a'"),
        ([True], "True"),
        ([1.0], "1.0"),
        (None, "NoneType"),
        (7, "int"),
        ({"text": 1}, "dict"),
        ("\ud800", "surrogate"),
        ([1] * 512, "512"),
        ("word " * 600, "prompt"),
        ([1] * 100_000, "100000"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_prompt(h, prompt, said):
    async def run():
        with pytest.raises(InvalidRequestError) as caught:
            h.llm.generate(prompt)
        assert caught.value.parameter == "prompt"
        assert said in str(caught.value)

    h.run(run())


def test_long_text_is_refused_to_the_waiter(h):
    async def run():
        stream = h.llm.generate("word " * 20_000)
        with pytest.raises(InvalidRequestError, match="prompt"):
            await stream
        with pytest.raises(InvalidRequestError):
            async for _ in stream:
                pass

    h.run(run())


@pytest.mark.parametrize(
    "options",
    [
        dict(request_id=7),
        dict(request_id=""),
        dict(request_id="x" * 1000),
        dict(priority=1),
        dict(priority=2**63),
        dict(priority=0.5),
        dict(timeout=0),
        dict(timeout=-1),
        dict(timeout=math.nan),
        dict(timeout="soon"),
        dict(cache_salt=b"bytes"),
        dict(lora="adapter"),
        dict(sampling_params={"n": 1}),
        dict(max_tokens=1, max_new_tokens=1),
    ],
    ids=str,
)
def test_option(h, options):
    async def run():
        with pytest.raises(InvalidRequestError) as caught:
            h.llm.generate(PROMPT, **options)
        assert caught.value.parameter in options

    h.run(run())


def test_own_id_that_looks_like_a_given_one(h):
    async def run():
        first = h.llm.generate(PROMPT, max_tokens=3, temperature=0)
        number = int(first.request_id.removeprefix("request-"))
        second = h.llm.generate(PROMPT, request_id=f"request-{number + 2}", max_tokens=3, temperature=0)
        third = h.llm.generate(PROMPT, max_tokens=3, temperature=0)
        assert len({first.request_id, second.request_id, third.request_id}) == 3
        for stream in (first, second, third):
            await stream

    h.run(run())


def test_duplicate_request_id(h):
    async def run():
        stream = h.llm.generate(PROMPT, request_id="twin", max_tokens=5, temperature=0)
        with pytest.raises(InvalidRequestError, match="twin"):
            h.llm.generate(PROMPT, request_id="twin")
        await stream
        await h.llm.generate(PROMPT, request_id="twin", max_tokens=1)

    h.run(run())


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [],
        [1],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
    ids=str,
)
def test_messages(h, messages):
    async def run():
        with pytest.raises(InvalidRequestError):
            h.llm.chat(messages)

    h.run(run())


def test_chat_template_that_is_broken_or_raises(h):
    messages = [{"role": "user", "content": "x"}]

    async def run():
        for template in ("{% for %}", "{{ raise_exception('no') }}", "{{ messages.__class__.__mro__ }}"):
            stream = None
            with pytest.raises(InvalidRequestError):
                stream = h.llm.chat(messages, chat_template=template)
                await stream

    h.run(run())


def test_queue_full(h):
    async def run():
        streams = [h.llm.generate(PROMPT, max_tokens=30, temperature=0) for _ in range(8)]
        with pytest.raises(QueueFullError, match="max_queued_requests"):
            h.llm.generate(PROMPT)
        outputs = await asyncio.gather(*[result(s) for s in streams])
        assert all(len(o.outputs[0].token_ids) == 30 for o in outputs)
        many = await h.llm.generate_many([PROMPT] * 30, max_tokens=3, temperature=0)
        assert len(many) == 30

    h.run(run())


async def result(stream):
    return await stream


def test_not_served_yet(h):
    async def run():
        for call in (h.llm.embed("x"), h.llm.classify("x"), h.llm.score("x", "y")):
            with pytest.raises(InvalidRequestError, match="not supported"):
                await call

    h.run(run())


def test_explicit_params_and_aliases(h):
    async def run():
        params = SamplingParams(temperature=0, max_tokens=3)
        assert len((await h.llm.generate(PROMPT, params)).outputs[0].token_ids) == 3
        assert len((await h.llm.generate(PROMPT, params, max_new_tokens=4)).outputs[0].token_ids) == 4
        assert len((await h.llm.generate(PROMPT, max_completion_tokens=2)).outputs[0].token_ids) == 2

    h.run(run())


# The engine as a whole


def create(model, **engine):
    async def run():
        await (await AsyncLLM.create(model, **engine)).aclose()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 0),
        ("max_model_len", 2**63),
        ("max_model_len", 100_000_000),
        ("max_num_seqs", 0),
        ("max_num_seqs", 2**31),
        ("max_num_batched_tokens", 3),
        ("block_size", 3),
        ("dtype", "int3"),
        ("dtype", 5),
        ("quantization", "int3"),
        ("quantization", 8),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", math.nan),
        ("tensor_parallel_size", 0),
        ("tensor_parallel_size", 2),
        ("data_parallel_size", 2),
        ("enable_expert_parallel", True),
        ("device", "tpu"),
        ("num_threads", 0),
        ("seed", 2**63),
        ("scheduling_policy", "lifo"),
        ("load_format", "pickle"),
        ("runner", "pooling"),
        ("nonsense", 1),
        ("max_logprobs", -1),
        ("kv_cache_memory_bytes", -5),
    ],
)
def test_engine_argument(demo_gguf, name, value):
    with pytest.raises(ConfigError) as caught:
        create(demo_gguf, **{name: value})
    assert caught.value.parameter == name
    assert name in str(caught.value)


def test_memory_that_is_not_there(demo_gguf):
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes"):
        create(demo_gguf, kv_cache_memory_bytes=2**50)
    with pytest.raises(OutOfMemoryError, match="max_model_len"):
        create(demo_gguf, kv_cache_memory_bytes=1 << 20, max_model_len=4096)


@pytest.mark.parametrize("model", ["", "no such model", "/nowhere/at/all", "a/b/c", 5])
def test_unknown_model(model):
    with pytest.raises((ConfigError, ModelLoadError)):
        create(model)


def test_empty_directory(tmp_path):
    with pytest.raises(ModelLoadError):
        create(tmp_path)


def test_config_without_weights_and_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError):
        create(tmp_path, load_format="dummy", skip_tokenizer_init=True)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ModelLoadError, match="GPT2LMHeadModel"):
        create(tmp_path, load_format="dummy", skip_tokenizer_init=True)


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_truncated_gguf(demo_gguf, tmp_path, keep):
    with open(demo_gguf, "rb") as file:
        data = file.read()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelLoadError):
        create(path)


def test_use_after_close(demo_gguf):
    async def run():
        llm = await AsyncLLM.create(demo_gguf, max_model_len=256)
        stream = llm.generate(PROMPT, max_tokens=200, ignore_eos=True)
        await anext(stream)
        await llm.aclose()
        with pytest.raises(EngineClosedError):
            await stream
        await llm.aclose()
        with pytest.raises(EngineClosedError):
            llm.generate(PROMPT)
        assert not llm.is_healthy
        with pytest.raises(EngineClosedError):
            await llm.reset_prefix_cache()

    asyncio.run(run())


def test_close_with_drain(demo_gguf):
    async def run():
        llm = await AsyncLLM.create(demo_gguf, max_model_len=256)
        stream = llm.generate(PROMPT, max_tokens=20, ignore_eos=True)
        await llm.aclose(drain=True)
        assert len((await stream).outputs[0].token_ids) == 20

    asyncio.run(run())


def test_use_from_a_second_loop_and_without_one(h):
    caught = []

    def other():
        async def use():
            h.llm.generate(PROMPT)

        try:
            asyncio.run(use())
        except EngineClosedError as error:
            caught.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "event loop" in caught[0]
    with pytest.raises(EngineClosedError, match="running event loop"):
        h.llm.generate(PROMPT)
    h.runner.run(settle(h.llm))
