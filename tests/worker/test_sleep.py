"""A rank asleep, without a host: what is lacking is told, nothing is taken, and it sleeps on."""

import msgspec
import pytest

from asyncengine.wire.stages import Sleep, Slept, Woken
from asyncengine.worker.ops import cpu_backend

from .tiny import Started, make_model, prompt, spec_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_model("Llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("level", [1, 2])
def test_lacking_memory(checkpoint, monkeypatch, level):
    with Started(spec_of(checkpoint), checkpoint) as started:
        ids = {0: prompt(20)}
        expected = started.driver().generate(ids, 8)
        slept = msgspec.msgpack.decode(
            started.stage("sleep", msgspec.msgpack.encode(Sleep(level))), type=Slept
        )
        weights = started.loaded.weight_bytes if level == 2 else 0
        assert slept.nbytes == started.allocated.kv_bytes + weights
        monkeypatch.setattr(cpu_backend, "available_bytes", lambda: slept.nbytes - 1)
        woken = msgspec.msgpack.decode(started.stage("wake_up"), type=Woken)
        assert f"{slept.nbytes:,} bytes were given back, and {slept.nbytes - 1:,} are free" in woken.lacking
        monkeypatch.undo()
        assert msgspec.msgpack.decode(started.stage("wake_up"), type=Woken).lacking == ""
        assert started.driver().generate(ids, 8) == expected
