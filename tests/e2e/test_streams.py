"""Streams: deltas, awaiting, and every way of leaving early. After each, the engine still serves."""

import asyncio
import gc
import threading

import pytest

from asyncengine import InvalidRequestError, RequestTimeoutError

from .harness import house

PROMPT = "Once upon a time, there was"
LONG = "word " * 1500


@pytest.fixture(scope="module")
def h(demo_gguf):
    with house(demo_gguf, dtype="float32", max_model_len=2048, max_num_seqs=8) as made:
        yield made


@pytest.fixture(autouse=True)
def still_serves(h):
    yield
    result = h.run(answer(h.llm))
    assert len(result.outputs[0].token_ids) == 4


async def answer(llm):
    return await llm.generate("The capital of France is", max_tokens=4, temperature=0)


def test_joined_deltas_are_the_result(h):
    async def run():
        deltas = [d async for d in h.llm.generate(PROMPT, max_tokens=40, temperature=0)]
        whole = await h.llm.generate(PROMPT, max_tokens=40, temperature=0)
        return deltas, whole

    deltas, whole = h.run(run())
    assert len(deltas) > 5
    assert "".join(d.text for d in deltas) == whole.outputs[0].text
    assert [t for d in deltas for t in d.token_ids] == whole.outputs[0].token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert whole.finished and whole.usage.total_tokens == len(whole.prompt_token_ids) + 40
    assert whole.metrics.total >= whole.metrics.first_token >= whole.metrics.queue >= 0


def test_text_stream(h):
    async def run():
        text = "".join(
            [piece async for piece in h.llm.generate(PROMPT, max_tokens=20, temperature=0).text_stream()]
        )
        return text, await h.llm.generate(PROMPT, max_tokens=20, temperature=0)

    text, whole = h.run(run())
    assert text == whole.outputs[0].text


def test_iterate_then_await_gives_the_whole(h):
    async def run():
        stream = h.llm.generate(PROMPT, max_tokens=10, temperature=0)
        first = await anext(stream)
        return first, await stream

    first, whole = h.run(run())
    assert whole.outputs[0].text.startswith(first.text)
    assert len(whole.outputs[0].token_ids) == 10


def test_slow_consumer_gets_coalesced_deltas(h):
    async def run():
        stream = h.llm.generate(PROMPT, max_tokens=64, temperature=0)
        deltas = [await anext(stream)]
        await asyncio.sleep(3)
        deltas += [d async for d in stream]
        return deltas

    deltas = h.run(run())
    assert sum(len(d.token_ids) for d in deltas) == 64
    assert max(len(d.token_ids) for d in deltas) > 8


def test_several_completions(h):
    async def run():
        deltas = [d async for d in h.llm.generate(PROMPT, n=3, max_tokens=12, temperature=1.0, seed=7)]
        return deltas, await h.llm.generate(PROMPT, n=3, max_tokens=12, temperature=1.0, seed=7)

    deltas, whole = h.run(run())
    assert [o.index for o in whole.outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in whole.outputs}) == 3
    for output in whole.outputs:
        mine = [d for d in deltas if d.index == output.index]
        assert [t for d in mine for t in d.token_ids] == output.token_ids
        assert "".join(d.text for d in mine) == output.text
        assert mine[-1].finish_reason == output.finish_reason


def test_text_stream_refuses_several_completions(h):
    async def run():
        stream = h.llm.generate(PROMPT, n=2, max_tokens=2)
        with pytest.raises(InvalidRequestError):
            stream.text_stream()
        await stream

    h.run(run())


# Leaving early


async def begun(llm, **fields):
    """A stream that has given its first token."""
    stream = llm.generate(PROMPT, **{"max_tokens": 1500, "temperature": 0, "ignore_eos": True} | fields)
    await anext(stream)
    return stream


async def gone(llm):
    """Waits until no request is left."""
    await asyncio.wait_for(llm.drain(), 5)


def test_break_cancels(h):
    async def run():
        async for _ in h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True):
            break
        await gone(h.llm)

    h.run(run())


def test_break_cancels_a_stream_that_is_kept(h):
    async def run():
        stream = h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True)
        async for _ in stream:
            break
        await gone(h.llm)
        assert stream.output.outputs[0].finish_reason == "cancelled"
        assert (await stream).outputs[0].finish_reason == "cancelled"

    h.run(run())


def test_break_from_text_stream_cancels(h):
    async def run():
        async for _ in h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True).text_stream():
            break
        await gone(h.llm)

    h.run(run())


def test_exception_cancels(h):
    async def run():
        with pytest.raises(ZeroDivisionError):
            async for _ in h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True):
                raise ZeroDivisionError
        await gone(h.llm)

    h.run(run())


@pytest.mark.parametrize("how", ["iterate", "await"])
def test_task_cancellation_cancels(h, how):
    async def consume(stream):
        if how == "await":
            return await stream
        return [d async for d in stream]

    async def run():
        stream = await begun(h.llm)
        task = asyncio.ensure_future(consume(stream))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone(h.llm)
        assert stream.output.outputs[0].finish_reason == "cancelled"

    h.run(run())


def test_asyncio_timeout_cancels(h):
    async def run():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True)
        await gone(h.llm)

    h.run(run())


def test_dropped_object_cancels(h):
    async def run():
        stream = await begun(h.llm)
        del stream
        gc.collect()
        await gone(h.llm)

    h.run(run())


def test_never_iterated_and_dropped(h):
    async def run():
        h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True)
        await gone(h.llm)

    h.run(run())


def test_cancel_from_another_task_ends_the_iteration(h):
    async def run():
        stream = await begun(h.llm)

        async def consume():
            return [d async for d in stream]

        task = asyncio.ensure_future(consume())
        await asyncio.sleep(0.05)
        stream.cancel()
        deltas = await asyncio.wait_for(task, 5)
        assert deltas[-1].finish_reason == "cancelled"
        assert (await stream).outputs[0].finish_reason == "cancelled"
        stream.cancel()
        await stream.aclose()

    h.run(run())


def test_cancel_from_another_thread(h):
    async def run():
        stream = await begun(h.llm)
        thread = threading.Thread(target=stream.cancel)
        thread.start()
        thread.join()
        assert (await asyncio.wait_for(stream, 5)).outputs[0].finish_reason == "cancelled"

    h.run(run())


def test_cancel_by_id(h):
    async def run():
        stream = await begun(h.llm, request_id="mine")
        assert h.llm.cancel("mine") is True
        assert h.llm.cancel("mine") is False
        assert (await stream).outputs[0].finish_reason == "cancelled"

    h.run(run())


def test_async_with_cancels(h):
    async def run():
        async with h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True) as stream:
            await anext(stream)
        assert stream.output.outputs[0].finish_reason == "cancelled"

    h.run(run())


def test_cancel_in_prefill(h):
    async def run():
        stream = h.llm.generate(LONG, max_tokens=10)
        while h.llm.metrics()["num_requests_running"] == 0:
            await asyncio.sleep(0.001)
        stream.cancel()
        assert h.llm.metrics()["num_requests_running"] == 0
        assert (await stream).outputs[0].token_ids == []

    h.run(run())


def test_cancel_in_queue(h):
    async def run():
        running = [await begun(h.llm, max_tokens=200) for _ in range(8)]
        waiting = h.llm.generate(PROMPT, max_tokens=10)
        await asyncio.sleep(0.05)
        assert h.llm.metrics()["num_requests_waiting"] == 1
        waiting.cancel()
        assert h.llm.metrics()["num_requests_waiting"] == 0
        assert (await waiting).outputs[0].finish_reason == "cancelled"
        for stream in running:
            stream.cancel()

    h.run(run())


def test_cancel_while_tokenizing(h):
    async def run():
        stream = h.llm.generate("word " * 300_000, max_tokens=10)
        await asyncio.sleep(0)
        stream.cancel()
        assert (await stream).outputs[0].finish_reason == "cancelled"

    h.run(run())


def test_cancel_all_of_several_completions(h):
    async def run():
        stream = await begun(h.llm, n=4, temperature=1.0)
        stream.cancel()
        assert {o.finish_reason for o in (await stream).outputs} == {"cancelled"}

    h.run(run())


def test_timeout(h):
    async def run():
        stream = h.llm.generate(PROMPT, max_tokens=1500, ignore_eos=True, timeout=0.3)
        with pytest.raises(RequestTimeoutError):
            await stream
        assert stream.output.outputs[0].finish_reason == "timeout"
        with pytest.raises(TimeoutError):
            async for _ in stream:
                pass

    h.run(run())


def test_two_readers_of_one_stream(h):
    async def run():
        stream = await begun(h.llm)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already being read"):
            await anext(stream)
        first.cancel()

    h.run(run())


# Ends


def test_stop_string_cuts_text_and_ids(h):
    async def run():
        plain = await h.llm.generate(PROMPT, max_tokens=40, temperature=0)
        text = plain.outputs[0].text
        stop = text[40:46]
        cut = await h.llm.generate(PROMPT, max_tokens=40, temperature=0, stop=[stop, "never to be seen"])
        kept = await h.llm.generate(
            PROMPT, max_tokens=40, temperature=0, stop=stop, include_stop_str_in_output=True
        )
        streamed = [d async for d in h.llm.generate(PROMPT, max_tokens=40, temperature=0, stop=stop)]
        return plain, stop, cut, kept, streamed

    plain, stop, cut, kept, streamed = h.run(run())
    text, at = plain.outputs[0].text, plain.outputs[0].text.index(stop)
    assert cut.outputs[0].text == text[:at] == "".join(d.text for d in streamed)
    assert kept.outputs[0].text == text[: at + len(stop)]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].stop_reason == stop
    ids = cut.outputs[0].token_ids
    assert ids == plain.outputs[0].token_ids[: len(ids)]
    assert [t for d in streamed for t in d.token_ids] == ids
    assert streamed[-1].stop_reason == stop


def test_stop_token_and_min_tokens(h):
    async def run():
        plain = await h.llm.generate(PROMPT, max_tokens=40, temperature=0)
        ids = plain.outputs[0].token_ids
        stop = ids[5]
        first = ids.index(stop)
        stopped = await h.llm.generate(PROMPT, max_tokens=40, temperature=0, stop_token_ids=[stop])
        later = await h.llm.generate(
            PROMPT, max_tokens=40, temperature=0, stop_token_ids=[stop], min_tokens=first + 5
        )
        return ids, stop, first, stopped, later

    ids, stop, first, stopped, later = h.run(run())
    assert stopped.outputs[0].token_ids == ids[: first + 1]
    assert stopped.outputs[0].stop_reason == stop
    assert stop not in later.outputs[0].token_ids[: first + 4]
    assert len(later.outputs[0].token_ids) >= first + 5


def test_eos_ends_a_chat_answer(h):
    async def run():
        messages = [{"role": "user", "content": "Say hello."}]
        ended = await h.llm.chat(messages, temperature=0, max_tokens=100)
        ignored = await h.llm.chat(messages, temperature=0, max_tokens=100, ignore_eos=True)
        return ended.outputs[0], ignored.outputs[0]

    ended, ignored = h.run(run())
    assert ended.finish_reason == "stop" and ended.stop_reason is None
    assert len(ended.token_ids) < 100 and len(ignored.token_ids) == 100
    assert ignored.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert "<|im_end|>" not in ended.text


def test_detokenize_off(h):
    async def run():
        return await h.llm.generate(PROMPT, max_tokens=5, temperature=0, detokenize=False)

    assert h.run(run()).outputs[0].text == ""
