"""The CUDA backend through plans, on CPU tensors: its tokens are those of transformers."""

import threading

import numpy as np
import pytest
import torch

from asyncengine.worker.cuda.device import HostDevice
from asyncengine.worker.cuda.flights import Draws, Flight, Flights
from asyncengine.worker.cuda.kv_cache import KVCache
from asyncengine.worker.cuda.plan import parse_plan

from .cuda_host import SIZES, HostStarted
from .plans import PlanBuilder, slot_init
from .tiny import assert_greedy, make_model, prompt, spec_of

PROMPTS = {3: prompt(17), 1: prompt(5), 0: prompt(1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("Qwen3", head_dim=16, num_hidden_layers=2)
    directory = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(directory)
    return model, spec_of(directory), directory


@pytest.fixture(scope="module")
def started(saved):
    with HostStarted(*saved[1:]) as started:
        yield started


@pytest.fixture(scope="module")
def expected(saved, started):
    tokens = started.driver().generate(PROMPTS, 4)
    for slot, ids in PROMPTS.items():
        assert_greedy(saved[0], ids, tokens[slot])
    return tokens


def test_stages_report_what_they_did(saved, started):
    spec = saved[1]
    assert started.loaded.weight_bytes == 4 * sum(p.numel() for p in saved[0].parameters())
    assert started.profiled.bytes_per_block == 4 * 2 * spec.num_layers * spec.num_kv_heads * 16 * 16
    assert started.profiled.device.weight_bytes == started.loaded.weight_bytes
    assert started.allocated.kv_bytes == started.num_blocks * started.profiled.bytes_per_block
    assert started.captured.operations == 3  # 1, 2 and 4 rows
    assert ("capture", 3, 3, "graphs") in started.progress
    loads = [done for stage, done, *_ in started.progress if stage == "load"]
    assert loads == sorted(loads) and len(loads) > 8


@pytest.mark.parametrize("how", [{"chunk": 7, "stagger": 2}, {"chunk": 3, "stagger": 1, "relay": False}])
def test_batching_chunking_and_relay_change_nothing(started, expected, how):
    assert started.driver().generate(PROMPTS, 4, **how) == expected


def test_eager_steps_give_the_same(started, expected, monkeypatch):
    monkeypatch.setattr(started.runner._cuda, "_graphs", None)
    assert started.driver().generate(PROMPTS, 2) == {slot: ids[:2] for slot, ids in expected.items()}


def test_an_fp8_cache_holds_rounded_keys_and_values(saved, started):
    """Those of the first layer, which depend on no other cached one."""
    ids = PROMPTS[3]
    small = dict(max_num_seqs=1, max_num_samples=1, max_num_batched_tokens=17)
    with HostStarted(*saved[1:], kv_dtype="fp8_e4m3", enforce_eager=True, **small) as fp8:
        assert fp8.captured.operations == 0
        assert fp8.profiled.bytes_per_block == started.profiled.bytes_per_block // 4
        layers = []
        for runner in (started, fp8):
            driver = runner.driver()
            driver.generate({0: ids}, 1)
            first = runner.runner._cuda.cache._memory[0][:, driver.tables[0]].transpose(2, 3)
            layers.append(first.flatten(1, 2)[:, : len(ids)])
    assert torch.equal(layers[0].to(torch.float8_e4m3fn).float(), layers[1].float())


def test_padding_rows_leave_no_trace(started):
    """Of three rows replayed as four, the padding one writes neither a token nor a key."""
    backend = started.runner._cuda
    driver = started.driver()
    driver.generate(PROMPTS, 2)
    used = {block for table in driver.tables.values() for block in table}
    unused = [block for block in range(started.num_blocks) if block not in used]
    memory = backend.cache._memory.nan_to_num_()
    backend._batch.arrays.last_token[2] = -9
    memory[:, :, unused] = np.pi
    plan = PlanBuilder()
    for slot, ids in PROMPTS.items():
        plan.relay(slot, len(ids) + 1)
        driver.extend(plan, slot, len(ids) + 2)
    wanted = {
        (driver.tables[slot][(len(ids) + 1) // 16], (len(ids) + 1) % 16) for slot, ids in PROMPTS.items()
    }
    for block, at in wanted:
        memory[:, :, block, :, at] = np.pi
    before = memory.clone()
    assert len(driver.send(plan)) == 3
    assert backend._batch.arrays.last_token[2] == -9
    changed = (memory != before).any(dim=(3, 5)).nonzero()  # layer, kind, block, position
    assert {(block, at) for _, _, block, at in changed.tolist()} == wanted


def test_steps_run_ahead_of_their_results(started, expected):
    """Every token is relayed on the device: three decode steps are launched before a result is looked at."""
    driver = started.driver()
    first = driver.generate(PROMPTS, 1)
    plans = []
    for turn in range(3):
        plan = PlanBuilder(step=turn)
        for slot, ids in PROMPTS.items():
            plan.relay(slot, len(ids) + turn)
            driver.extend(plan, slot, len(ids) + turn + 1)
        plans.append(plan.encode())
    for plan in plans:
        assert started.runner.step(plan) is None
    results = [np.frombuffer(started.results.get(timeout=30), np.int32) for _ in plans]
    assert [result[1] for result in results] == [0, 1, 2]
    for index, slot in enumerate(PROMPTS):
        drawn = [int(result[8 + index]) for result in results]
        assert first[slot] + drawn == expected[slot][:4]


def test_a_preempted_sequence_comes_back(started, expected):
    """Its blocks are lost; in another slot, with all its tokens inline, it goes on as before."""
    ids = PROMPTS[3] + expected[3][:3]
    driver = started.driver()
    driver.generate({3: PROMPTS[3]}, 3)
    driver = started.driver()
    plan = PlanBuilder(inits=[slot_init(2, len(PROMPTS[3]))])
    driver.extend(plan, 2, len(ids))
    plan.inline(2, 0, ids, sample=True)
    assert driver.send(plan) == [expected[3][3]]


def test_block_copies_are_done_in_order(started, saved):
    memory = started.runner._cuda.cache._memory
    memory.normal_()
    before = memory.clone()
    started.driver().send(PlanBuilder(copies=[(7, 30), (30, 31), (8, 7), (9, 32)]))
    for source, target in ((7, 30), (7, 31), (8, 7), (9, 32), (10, 10)):
        assert (memory[:, :, target] == before[:, :, source]).all()
    started.driver().send(PlanBuilder(copies=[(1, 20), (1, 21)]))
    assert (memory[:, :, [20, 21]] == before[:, :, [1, 1]]).all()


def test_the_last_update_of_a_place_wins(started, expected):
    driver = started.driver()
    plan = PlanBuilder(inits=[slot_init(1, 5)])
    plan.updates = [(1, 0, 12), (1, 0, 3), (1, 0, 5)]
    plan.inline(1, 0, PROMPTS[1], sample=True)
    assert driver.send(plan) == expected[1][:1]
    assert started.runner._cuda._batch.arrays.block_table[1, 0] == 5


def test_steps_without_rows_or_samples_still_reply(started):
    driver = started.driver()
    assert driver.send(PlanBuilder(epoch=-7)) == []
    plan = PlanBuilder(inits=[slot_init(0, 9)])
    driver.extend(plan, 0, 5)
    plan.inline(0, 0, prompt(9)[:5], sample=False)
    assert driver.send(plan) == []


def test_a_plan_out_of_bounds_is_refused(started):
    driver = started.driver()
    for plan in (
        PlanBuilder(rows=[(4, 0, 1, 0)], tokens=[3]),
        PlanBuilder(rows=[(0, 96, 1, 0)], tokens=[3]),
        PlanBuilder(updates=[(0, 0, SIZES["num_blocks"])]),
        PlanBuilder(rows=[(0, 0, 25, 0)], tokens=[3] * 25),
    ):
        with pytest.raises(ValueError, match="out of bounds"):
            driver.send(plan)
    plan = PlanBuilder()
    plan.verify(0, 0, [3, 4])
    with pytest.raises(ValueError, match=r"out of bounds|drafts"):
        driver.send(plan)


def test_graphs_notice_that_memory_has_moved(started, caplog):
    driver = started.driver()
    driver.generate({0: prompt(3)}, 2)
    backend = started.runner._cuda
    kept = backend.cache
    plan = PlanBuilder()
    plan.relay(0, 4)
    backend.cache = KVCache(backend.kv_layout, SIZES["num_blocks"], torch.device("cpu"))
    try:
        with caplog.at_level("DEBUG", "asyncengine"), pytest.raises(RuntimeError, match="moved"):
            driver.send(plan)
    finally:
        backend.cache = kept


def test_a_plan_larger_than_its_buffers():
    """Block tables and histories of many sequences that enter at once."""
    flight = Flight(HostDevice(), 4, Draws(2, 0, torch.device("cpu")))
    parts = [np.arange(3, dtype=np.int32), np.full((5, 3), 7, np.int32)]
    assert flight.stage(parts) == 18
    assert flight.staged[:18].tolist() == [0, 1, 2] + [7] * 15
    assert len(flight.plan) == len(flight.staged) >= 18


def test_the_results_thread_attaches_to_the_device_and_tells_why_it_ended(monkeypatch):
    news, told = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: told.set())

    def deliver(result):
        news.append("result")
        raise ValueError("the ring is gone")

    device = HostDevice()
    flights = Flights(
        [Flight(device, 4, Draws(2, 0, device.place))], lambda: news.append("attached"), deliver
    )
    flight = flights.take()
    flight.depart(parse_plan(PlanBuilder().encode()))
    flight.arrive(np.zeros(0, np.int32))
    flights.send(flight)
    assert told.wait(30) and news == ["attached", "result"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the ring is gone"):
            flights.take()


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 9, "head_dim": 24}),
        ("Qwen2", {"num_key_value_heads": 4}),
    ],
)
def test_every_architecture_agrees_with_transformers(architecture, fields, tmp_path):
    model = make_model(architecture, num_hidden_layers=1, **fields)
    model.save_pretrained(tmp_path)
    with HostStarted(spec_of(tmp_path), tmp_path, max_num_seqs=2, max_num_samples=2) as started:
        prompts = {0: prompt(18), 1: prompt(4)}
        tokens = started.driver().generate(prompts, 2, chunk=16)
        expected_bytes = 4 * sum(p.numel() for p in model.parameters())
        assert started.loaded.weight_bytes == expected_bytes
    for slot, ids in prompts.items():
        assert_greedy(model, ids, tokens[slot])
