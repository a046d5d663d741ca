"""Weights in host memory and sleep of the CUDA backend, on CPU tensors: tokens stay what they were."""

import weakref

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncengine.errors import OutOfMemoryError
from asyncengine.wire.stages import Sleep, Slept, Woken
from asyncengine.worker.cuda import backend as backend_module
from asyncengine.worker.cuda import offload
from asyncengine.worker.cuda.device import HostDevice
from asyncengine.worker.cuda.offload import Offload, choose

from .cuda_host import HostStarted
from .tiny import make_model, prompt, spec_of

PROMPTS = {3: prompt(17), 1: prompt(5)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("Qwen2", num_hidden_layers=2)  # its QKV has biases, which stay
    directory = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(directory)
    return spec_of(directory), directory


@pytest.fixture(scope="module")
def expected(saved):
    with HostStarted(*saved) as started:
        return started.loaded.weight_bytes, started.driver().generate(PROMPTS, 2)


def sleep(started, level):
    return msgspec.msgpack.decode(started.stage("sleep", msgspec.msgpack.encode(Sleep(level))), type=Slept)


def wake_up(started):
    return msgspec.msgpack.decode(started.stage("wake_up"), type=Woken).lacking


def test_offloaded_weights_give_the_same_tokens(saved, expected):
    weight_bytes, tokens = expected
    with HostStarted(*saved, cpu_offload_bytes=60_000) as started:
        weights = started.runner._cuda._weights
        assert isinstance(weights, Offload)
        away = sum(tensor.nbytes for tensor in weights._away.values())
        assert 40_000 < away <= 60_000
        largest = max(tensor.nbytes for tensor in weights._away.values())
        assert started.loaded.weight_bytes == weight_bytes - away + largest
        assert started.driver().generate(PROMPTS, 2) == tokens
        for level in (1, 2):
            sleep(started, level)
            assert wake_up(started) == ""
            assert started.driver().generate(PROMPTS, 2) == tokens


def test_sleep_and_wake_up(saved, expected, monkeypatch):
    with HostStarted(*saved) as started:
        backend = started.runner._cuda
        assert wake_up(started) == ""  # it is awake
        for levels in ([1], [1, 2], [2, 1]):
            for level in levels:
                assert sleep(started, level).lacking == ""
            on_device = [] if max(levels) == 2 else list(backend._weights.tensors())
            assert bool(on_device) == (backend._parked is not None)
            assert not hasattr(backend, "cache") and backend._graphs is None
            assert wake_up(started) == "" and backend._parked is None
            assert started.driver().generate(PROMPTS, 2) == expected[1], levels

        # No room in host memory: it stays awake, unless the weights are forgotten.
        monkeypatch.setattr(offload, "available_bytes", lambda: 1000)
        assert "do not fit into host memory, of which 1,000" in sleep(started, 1).lacking
        assert started.driver().generate(PROMPTS, 2) == expected[1]
        monkeypatch.undo()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("where", ["_fill", "_capture_graphs"])
def test_no_room_to_wake_up_and_then_there_is(saved, expected, monkeypatch, level, where):
    if (level, where) == (1, "_fill"):
        pytest.skip("nothing is loaded")
    with HostStarted(*saved, enforce_eager=True) as started:
        backend = started.runner._cuda

        def fail(*args):
            raise OutOfMemoryError("the GPU has no room")

        sleep(started, level)
        monkeypatch.setattr(backend, where, fail)
        assert wake_up(started) == wake_up(started) == "the GPU has no room"
        assert not hasattr(backend, "cache")
        assert (backend._parked is not None) == (level == 1)
        monkeypatch.undo()
        assert wake_up(started) == ""
        assert started.driver().generate(PROMPTS, 2) == expected[1]


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_released_when_nothing_holds_it_any_more(saved, monkeypatch, level):
    """Also when it was taken in vain: errors hold the frames that they have come through."""
    held, released = [], []

    class Allocator(HostDevice):
        def release(self):
            released.append([tensor for tensor in held if tensor() is not None])

    with HostStarted(*saved, open_device=Allocator, enforce_eager=True) as started:
        backend = started.runner._cuda

        def fail(*args):
            activation = torch.zeros(1)
            held.extend(weakref.ref(tensor) for tensor in (activation, backend.cache._memory))
            raise torch.OutOfMemoryError("no room for an activation")

        monkeypatch.setattr(backend_module, "Graphs", fail)
        held.extend(weakref.ref(tensor) for tensor in backend._weights.tensors())
        held.append(weakref.ref(backend.cache._memory))
        sleep(started, level)
        assert released.pop() == [] and len(held) > 10
        monkeypatch.setattr(backend, "_config", msgspec.structs.replace(backend._config, enforce_eager=False))
        assert "no room for an activation" in wake_up(started)
        assert released.pop() == []


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.floats(0, 1.5))
def test_chosen_are_spread_and_within_the_budget(sizes, share):
    named = dict(enumerate(sizes))
    budget = int(share * sum(sizes))
    chosen = choose(named, budget)
    total = sum(sizes)
    assert sum(named[i] for i in chosen) <= min(budget, total)
    if share >= 1:
        assert len(chosen) == len(sizes)
    taken = seen = 0
    for i, size in named.items():
        seen += size
        taken += size * (i in chosen)
        # At every point as much has been taken as is its share, but for less than one weight.
        assert min(budget, total) * seen / total - 2 * max(sizes) < taken <= budget * seen / total + 1
