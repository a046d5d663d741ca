"""Speculation changes how fast tokens come, and nothing else."""

import asyncio
import contextlib
import random
from array import array

import pytest

from asyncengine import AsyncLLM, ConfigError, SamplingParams
from asyncengine.scheduling.step_cost import StepCost

from ..worker.tiny import make_model, prompt
from .harness import house, settle

NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
COPY = (
    "<|im_start|>user\nRepeat this text: The Eiffel Tower was completed in 1889, and it stands 330 metres "
    "tall on the Champ de Mars.<|im_end|>\n<|im_start|>assistant\nThe Eiffel Tower was"
)
PROMPTS = [COPY, "one two three four one two three", "The capital of France is", "def f(x):\n    return"] * 4
GREEDY = dict(max_tokens=40, temperature=0, ignore_eos=True)
SEEDED = dict(max_tokens=40, temperature=0.4, top_p=0.95, top_k=50, seed=7, ignore_eos=True)
TINY = dict(dtype="float32", skip_tokenizer_init=True, max_model_len=250, max_num_seqs=16)


@pytest.fixture
def always(monkeypatch):
    """Drafts whatever can be drafted: the steps of tiny models are too short to be worth it."""
    monkeypatch.setattr(StepCost, "worth_waiting", lambda self, *args: True)
    monkeypatch.setattr(StepCost, "times", lambda self, tokens, drafts: array("d", [1.0]) * (drafts + 1))


def generate(model, prompts, params, speculative, check=None, **engine):
    async def run():
        async with await AsyncLLM.create(model, speculative=speculative, **engine) as llm:
            shared = {} if isinstance(params, list) else params
            outputs = await llm.generate_many(prompts, None if shared else params, **shared)
            await settle(llm)
            if check is not None:
                check(llm.metrics())
            return [output.outputs for output in outputs]

    return asyncio.run(run())


def ids(outputs):
    return [[o.token_ids for o in several] for several in outputs]


def accepted(metrics):
    assert (
        0 < metrics["spec_decode_num_accepted_tokens_total"] <= metrics["spec_decode_num_draft_tokens_total"]
    )
    assert metrics["spec_decode_num_drafts_total"] <= metrics["spec_decode_num_draft_tokens_total"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_model("Llama", seed=3).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_demo_model_alone_and_in_a_batch(demo_gguf, always, params):
    engine = dict(dtype="float32", max_model_len=512)
    params = params | {"max_tokens": 20}
    plain = ids(generate(demo_gguf, PROMPTS[:4], params, None, **engine))
    assert ids(generate(demo_gguf, PROMPTS[:1], params, NGRAM, accepted, **engine)) == plain[:1]
    assert ids(generate(demo_gguf, PROMPTS, params, NGRAM, accepted, **engine)) == plain * 4


def loops(count):
    """Prompts that repeat themselves, and some that do not."""
    return [prompt(7 + i) * 3 if i % 4 else prompt(20 + i) for i in range(count)]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "engine",
    [
        dict(),
        dict(max_num_batched_tokens=16),
        dict(block_size=1),
        dict(block_size=4, kv_cache_memory_bytes=4 * 3 * 2 * 2 * 16 * 4 * 100),
        dict(enforce_eager=True, enable_prefix_caching=False),
        dict(tensor_parallel_size=2),
    ],
    ids=["default", "chunks", "blocks of one", "preemption", "eager", "two ranks"],
)
def test_settings_change_nothing(tiny, tiny_plain, always, params, engine):
    def check(metrics):
        if not params["temperature"]:  # what is drawn at random follows a draft by chance only
            accepted(metrics)
        assert bool(metrics["num_preemptions_total"]) == ("kv_cache_memory_bytes" in engine)

    result = generate(tiny, loops(16), params, NGRAM, check, **(TINY | engine))
    assert ids(result) == tiny_plain[params["temperature"]]


@pytest.fixture(scope="module")
def tiny_plain(tiny):
    return {p["temperature"]: ids(generate(tiny, loops(16), p, None, **TINY)) for p in (GREEDY, SEEDED)}


def test_endings_and_logprobs_and_siblings_are_the_same(demo_gguf, always):
    """Stop tokens inside an accepted run, minimum lengths, logprobs, n > 1, penalties beside drafts."""
    engine = dict(dtype="float32", max_model_len=512)
    ((copied,),) = ids(generate(demo_gguf, [COPY], GREEDY, None, **engine))
    stops = (copied[12], copied[17])
    params = [
        SamplingParams(**(GREEDY | fields))
        for fields in (
            dict(stop_token_ids=stops),
            dict(stop_token_ids=stops, min_tokens=15),
            dict(logprobs=3),
            dict(n=3, temperature=0.5, seed=3),
            dict(repetition_penalty=1.1),
            dict(max_tokens=7),
            dict(presence_penalty=0.5, logprobs=0),
        )
    ]

    plain = generate(demo_gguf, [COPY] * 7, params, None, **engine)
    drafted = generate(demo_gguf, [COPY] * 7, params, NGRAM, accepted, **engine)
    assert drafted == plain
    assert [o.finish_reason for several in plain for o in several] == ["stop"] * 2 + ["length"] * 7


def test_stop_strings_end_inside_an_accepted_run(demo_gguf, always):
    engine = dict(dtype="float32", max_model_len=512)
    params = [SamplingParams(**GREEDY, stop=stop, logprobs=1) for stop in (["metres"], ["1889", "330"])]
    counts = []

    def check(metrics):
        counts.append(metrics["generation_tokens_total"])

    plain = generate(demo_gguf, [COPY] * 2, params, None, check, **engine)
    assert generate(demo_gguf, [COPY] * 2, params, NGRAM, check, **engine) == plain
    assert [o.stop_reason for (o,) in plain] == ["metres", "1889"]
    assert counts == [sum(len(o.token_ids) for (o,) in plain)] * 2


def test_copied_text_takes_fewer_steps(demo_gguf, always):
    counts = {}
    for name, speculative in (("plain", None), ("ngram", NGRAM)):

        def check(metrics, name=name):
            counts[name] = metrics["steps_total"]

        engine = dict(dtype="float32", max_model_len=512)
        generate(demo_gguf, PROMPTS[:1], GREEDY, speculative, check, **engine)
    assert counts["plain"] >= 40
    assert counts["ngram"] < 0.6 * counts["plain"]


def test_a_prefix_that_was_drafted_is_found_again(tiny, always):
    """What verified rows computed is published, rejected tokens are not: a second turn gives the same."""

    async def run(speculative):
        async with await AsyncLLM.create(tiny, speculative=speculative, **(TINY | {"block_size": 4})) as llm:
            first = await llm.generate(loops(2)[1], **GREEDY)
            history = first.prompt_token_ids + first.outputs[0].token_ids
            second = await llm.generate(history + prompt(5), **GREEDY)
            return history, second.outputs[0].token_ids, second.num_cached_tokens

    assert asyncio.run(run(NGRAM)) == asyncio.run(run(None))


def test_a_storm_of_cancellations_leaves_nothing_behind(tiny, always):
    numbers = random.Random(5)

    async def one(llm, index):
        stream = llm.generate(loops(16)[index % 16], **(GREEDY | dict(max_tokens=120, n=1 + index % 2)))
        stop_after = numbers.randrange(12)
        count = 0
        with contextlib.suppress(asyncio.CancelledError):
            async for _ in stream:
                count += 1
                if count >= stop_after:
                    break
        await stream.aclose()

    async def storm(llm):
        await asyncio.gather(*(one(llm, i) for i in range(80)))
        output = await llm.generate(loops(2)[1], **GREEDY)
        return output.outputs[0].token_ids

    with house(tiny, speculative=NGRAM, **(TINY | dict(block_size=4))) as at:
        assert at.run(storm(at.llm)) == at.run(storm(at.llm))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ngram", "dict"),
        ({}, "'method': 'ngram'"),
        ({"method": "eagle"}, "'method': 'ngram'"),
        ({"method": "ngram", "model": "x"}, "'model'.*num_speculative_tokens, prompt_lookup_max"),
        ({"method": "ngram", "num_speculative_tokens": 0}, r"'num_speculative_tokens'.*\[1, 64\]"),
        ({"method": "ngram", "num_speculative_tokens": True}, "integer"),
        ({"method": "ngram", "prompt_lookup_max": 33}, r"\[1, 32\]"),
        ({"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "at most"),
    ],
)
def test_bad_settings_are_refused(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        asyncio.run(AsyncLLM.create("nothing", speculative=value))
    assert caught.value.parameter == "speculative"
