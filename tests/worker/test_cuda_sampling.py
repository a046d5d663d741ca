"""Sampling on the CUDA backend, on CPU tensors: its draws are those of the CPU backend."""

import msgspec
import numpy as np
import pytest

from .cuda_host import SIZES, HostStarted
from .plans import PlanBuilder, slot_init
from .tiny import Started, make_model, prompt, spec_of

PROMPTS = {2: prompt(9), 0: prompt(4)}
STOP_IDS = list(range(3, 120))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(CPU, CUDA)"""
    model = make_model("Llama", num_hidden_layers=1, num_key_value_heads=4)
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    spec = spec_of(directory)
    sizes = SIZES | {"device": "cpu", "block_size": 4}
    with Started(spec, directory, **sizes) as cpu, HostStarted(spec, directory) as cuda:
        yield cpu, cuda


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.7, "seed": 2**64 - 1, "top_k": 7, "top_p": 0.9},
        {"temperature": 1.3, "seed": 11, "top_p": 0.6, "min_p": 0.02, "logprobs": 0},
        {"repetition_penalty": 1.8, "frequency_penalty": 0.7, "presence_penalty": -0.3, "logprobs": 6},
        {"min_len": 13, "stop_ids": STOP_IDS, "temperature": 0.5, "seed": 3, "logprobs": 2},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_draws_are_those_of_the_cpu(both, fields):
    drivers = [started.driver() for started in both]
    expected, drawn = [driver.generate(PROMPTS, 5, **fields) for driver in drivers]
    assert drawn == expected
    if fields.get("min_len"):
        assert not set(drawn[2][:4]) & set(STOP_IDS)  # positions 9 to 12
    for of_cpu, of_cuda in zip(*(driver.details for driver in drivers), strict=True):
        assert (of_cpu is None) == (of_cuda is None) == ("logprobs" not in fields)
        if of_cpu is None:
            continue
        assert of_cuda.failures == {} and of_cuda.logprobs.keys() == of_cpu.logprobs.keys()
        for sample, row in of_cpu.logprobs.items():
            other = of_cuda.logprobs[sample]
            assert (other.rank, other.top_ids) == (row.rank, row.top_ids)
            np.testing.assert_allclose(other.sampled, row.sampled, atol=2e-4)
            np.testing.assert_allclose(other.top_logprobs, row.top_logprobs, atol=2e-4)


def test_only_rows_that_ask_have_logprobs(both):
    """A sequence with penalties and log-probabilities beside one without either."""
    details = []
    for started in both:
        driver = started.driver()
        plan = PlanBuilder(
            inits=[
                slot_init(3, 4),
                slot_init(1, 4, logprobs=3, presence_penalty=1.0, history=prompt(6), seed=8, temperature=1.0),
            ]
        )
        for slot in (3, 1):
            driver.extend(plan, slot, 6)
            plan.inline(slot, 0, prompt(6), sample=True)
        driver.send(plan)
        details.append(driver.details[-1].logprobs)
    assert list(details[0]) == list(details[1]) == [1]
    assert details[0][1].top_ids == details[1][1].top_ids


def test_a_reused_slot_forgets(both):
    """Penalties, log-probabilities and noise of the last sequence are gone."""
    cuda = both[1]
    expected = both[0].driver().generate({1: prompt(7)}, 3)
    cuda.driver().generate({1: prompt(12)}, 2, repetition_penalty=2.0, temperature=1.0, logprobs=3)
    driver = cuda.driver()
    assert driver.generate({1: prompt(7)}, 3) == expected
    assert set(driver.details) == {None}


def test_rows_that_fail_are_told_apart(both):
    """A damaged key makes one sequence's logits NaN; the other sequence does not notice."""
    cuda = both[1]
    driver = cuda.driver()
    expected = both[0].driver().generate({0: PROMPTS[0]}, 4, logprobs=1)[0]
    driver.generate(PROMPTS, 2, logprobs=1)
    cuda.runner._cuda.cache._memory[0, 1, driver.tables[2][0]] = float("nan")
    plan = PlanBuilder()
    for slot, ids in PROMPTS.items():
        plan.relay(slot, len(ids) + 1)
    tokens = driver.send(plan)
    assert tokens == [-1, expected[2]]
    details = driver.details[-1]
    assert list(details.failures) == [0] and "non-finite" in details.failures[0]
    assert list(details.logprobs) == [1]
    # The failed row's token is relayed before the host has heard of it: nothing breaks.
    plan = PlanBuilder()
    for slot, ids in PROMPTS.items():
        plan.relay(slot, len(ids) + 2)
    assert driver.send(plan) == [-1, expected[3]]
    msgspec.msgpack.encode(driver.details[-1])
