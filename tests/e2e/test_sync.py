"""`LLM`: the blocking twin, as scripts written for vLLM's class of that name use it."""

import pytest

from asyncengine import LLM, EngineClosedError, InvalidRequestError, SamplingParams

PROMPTS = ["The capital of France is", "One, two, three,"]


@pytest.fixture(scope="module")
def llm(demo_gguf):
    with LLM(demo_gguf, dtype="float32", max_model_len=512) as made:
        yield made


def test_generate(llm):
    params = SamplingParams(temperature=0, max_tokens=6)
    outputs = llm.generate(PROMPTS, params)
    assert [o.prompt for o in outputs] == PROMPTS
    assert "Paris" in outputs[0].outputs[0].text
    for given in (PROMPTS[0], [PROMPTS[0]], {"prompt": PROMPTS[0]}, outputs[0].prompt_token_ids):
        again = llm.generate(given, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in again] == [outputs[0].outputs[0].token_ids]
    ids = {"prompt_token_ids": outputs[1].prompt_token_ids}
    each = llm.generate([PROMPTS[0], ids], [params, SamplingParams(temperature=0, max_tokens=2)])
    assert [len(o.outputs[0].token_ids) for o in each] == [6, 2]


def test_chat(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=12)
    one = llm.chat(messages, params)
    two = llm.chat([messages, messages], params, use_tqdm=False)
    assert "Paris" in one[0].outputs[0].text
    assert [o.outputs[0].text for o in two] == [one[0].outputs[0].text] * 2


def test_errors_come_through(llm):
    with pytest.raises(InvalidRequestError):
        llm.generate("", SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequestError, match="2 prompts but 1"):
        llm.generate(PROMPTS, [SamplingParams()])
    with pytest.raises(InvalidRequestError, match="not supported"):
        llm.embed("x")
    assert llm.get_metrics()["num_requests_running"] == 0


def test_close(demo_gguf):
    llm = LLM(demo_gguf, max_model_len=128)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("x")
