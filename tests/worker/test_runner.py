"""The step: plans of every shape give the same tokens, and broken plans are refused."""

import struct

import numpy as np
import pytest

from asyncengine.errors import ConfigError, ModelLoadError
from asyncengine.wire.plan import RELAY, SAMPLE

from .plans import PlanBuilder, slot_init
from .test_rope import make_spec
from .tiny import Started, assert_greedy, make_model, prompt, spec_of

PROMPTS = {4: prompt(33), 1: prompt(5), 7: prompt(18), 2: prompt(1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("Qwen3", head_dim=16)
    directory = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(directory)
    return model, spec_of(directory), directory


@pytest.fixture(scope="module")
def started(saved):
    with Started(*saved[1:]) as started:
        yield started


@pytest.fixture(scope="module")
def expected(saved, started):
    tokens = {}
    for slot, ids in PROMPTS.items():
        tokens |= started.driver().generate({slot: ids}, 10)
        assert_greedy(saved[0], ids, tokens[slot])
    return tokens


@pytest.mark.parametrize(
    "how",
    [
        {"chunk": 1},
        {"chunk": 16},
        {"stagger": 3},
        {"relay": False},
        {"chunk": 3, "stagger": 1, "relay": False},
    ],
)
def test_batching_chunking_and_relay_change_nothing(started, expected, how):
    assert started.driver().generate(PROMPTS, 10, **how) == expected


@pytest.mark.parametrize(
    "fields",
    [{"enforce_eager": True}, {"num_threads": 1}, {"block_size": 1}, {"block_size": 32, "num_blocks": 40}],
)
def test_settings_change_nothing(saved, expected, fields):
    with Started(*saved[1:], **fields) as other:
        assert other.driver().generate(PROMPTS, 10, chunk=9) == expected
        assert (other.captured.operations == 0) == other.config.enforce_eager


def test_logits_do_not_depend_on_the_batch(started, expected):
    driver = started.driver()
    driver.generate({4: PROMPTS[4]}, 10, logprobs=0)
    alone = started.logits(1)[0]
    driver = started.driver()
    driver.generate(PROMPTS, 10, chunk=16, logprobs=0)
    # Slot 4 is the last one to finish, so it is alone in the last plan.
    assert np.array_equal(started.logits(1)[0], alone)


def test_block_copies_fork_a_sequence(saved, started, expected):
    """A child shares the parent's full blocks, gets a copy of the partial one, and goes its own way."""
    model, ids, size = saved[0], PROMPTS[4], started.config.block_size
    driver = started.driver()
    driver.generate({4: ids}, 3)
    kept = len(ids) - 1
    shared = kept // size
    child_table = [*driver.tables[4][:shared], driver.free.pop()]
    plan = PlanBuilder(inits=[slot_init(5, len(ids))])
    plan.updates = [(5, index, block) for index, block in enumerate(child_table)]
    plan.copies = [(driver.tables[4][shared], child_table[shared])]
    driver.tables[5] = child_table
    other = (ids[-1] + 1) % 200
    plan.inline(5, kept, [other], sample=True)
    token = driver.send(plan)
    assert_greedy(model, [*ids[:-1], other], token)
    # The parent's own block is as it was.
    plan = PlanBuilder()
    plan.relay(4, len(ids) + 2)
    driver.extend(plan, 4, len(ids) + 3)
    assert driver.send(plan) == [expected[4][3]]


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "top_k": 40, "seed": 3}])
def test_a_verified_row_draws_what_decoding_draws(started, fields):
    """Right drafts give the next tokens at once; what a wrong one left in the cache is written over."""
    ids, fields = PROMPTS[7], {"logprobs": 5} | fields
    driver = started.driver()
    tokens = driver.generate({7: ids}, 10, **fields)[7]
    alone = [details.logprobs[0] for details in driver.details]
    beside = started.driver().generate({4: PROMPTS[4]}, 3)[4]
    driver = started.driver()
    driver.generate({7: ids}, 3, **fields)
    assert driver.generate({4: PROMPTS[4]}, 2)[4] == beside[:2]
    start = len(ids) + 2
    plan = PlanBuilder()
    driver.extend(plan, 7, start + 6)
    driver.extend(plan, 4, len(PROMPTS[4]) + 2)
    plan.relay(4, len(PROMPTS[4]) + 1)
    wrong = (tokens[5] + 1) % 211
    plan.verify(7, start, [*tokens[2:5], wrong, 3, 4])
    drawn = driver.send(plan)
    assert len(drawn) == 7 and drawn[1:4] == tokens[3:6]
    assert [driver.details[-1].logprobs[sample] for sample in (1, 2, 3)] == alone[3:6]
    assert drawn[0] == beside[2]
    for at in range(5, 9):
        plan = PlanBuilder()
        driver.extend(plan, 7, len(ids) + at + 1)
        plan.inline(7, len(ids) + at, [tokens[at]], sample=True)
        assert driver.send(plan) == [tokens[at + 1]]


def test_more_samples_than_the_buffers_hold_are_refused(started):
    driver = started.driver()
    plan = PlanBuilder(inits=[slot_init(0, 25)])
    driver.extend(plan, 0, 25)
    plan.verify(0, 0, prompt(25))
    with pytest.raises(ValueError, match="25 samples; there are 8 slots, 128 tokens and 24 samples"):
        driver.send(plan)


def test_copies_are_done_in_order(started):
    driver = started.driver()
    driver.generate({0: prompt(4)}, 1, logprobs=0)
    (source,) = driver.tables[0][:1]
    driver.send(PlanBuilder(copies=[(source, 150), (150, 151), (151, 152)]))
    cache = started.runner.backend.cache
    blocks = cache._blocks
    assert blocks[source].any() and np.array_equal(blocks[source], blocks[152])


def test_steps_without_samples_or_rows_still_reply(started):
    driver = started.driver()
    assert driver.send(PlanBuilder(epoch=-7)) == []
    plan = PlanBuilder(epoch=2**31 - 1, inits=[slot_init(0, 9)])
    plan.inline(0, 0, prompt(9)[:5], sample=False)
    driver.extend(plan, 0, 5)
    assert driver.send(plan) == []


def test_a_reused_slot_forgets(saved, started, expected):
    driver = started.driver()
    driver.generate({1: prompt(50)}, 5, repetition_penalty=2.0, temperature=1.0, logprobs=3)
    assert started.driver().generate({1: PROMPTS[1]}, 10)[1] == expected[1]


def test_a_full_step(saved):
    """Every slot and every token of the budget in one plan."""
    model, spec, directory = saved
    with Started(spec, directory, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=16) as started:
        prompts = {slot: prompt(8 + slot)[slot:] for slot in range(4)}
        tokens = started.driver().generate(prompts, 8)
        for slot, ids in prompts.items():
            assert_greedy(model, ids, tokens[slot])


def encoded(rows=(), ids=(), **header):
    values = {"rows": len(rows), "tokens": len(ids), "updates": 0, "copies": 0, "payload": 0} | header
    words = [
        1,
        2,
        values["rows"],
        values["tokens"],
        values["updates"],
        values["copies"],
        values["payload"],
        0,
    ]
    words += [word for row in rows for word in row] + list(ids)
    return struct.pack(f"<{len(words)}i", *words)


BROKEN = [
    b"",
    b"\0" * 31,
    encoded(updates=1),
    encoded(tokens=-1),
    encoded(payload=5),
    encoded(updates=2**30),
    encoded([(0, 0, 2, SAMPLE)], [5]),
    encoded([(0, 0, 0, 0), (1, 0, 2, SAMPLE)], [5, 6]),
    encoded([(0, 0, 129, SAMPLE)], [5] * 129),
    encoded([(slot % 8, 0, 1, SAMPLE) for slot in range(9)], [5] * 9),
    encoded([(8, 0, 1, SAMPLE)], [5]),
    encoded([(-1, 0, 1, SAMPLE)], [5]),
    encoded([(0, -1, 1, SAMPLE)], [5]),
    encoded([(0, 160, 1, SAMPLE)], [5]),
    encoded([(0, 2**31 - 1, 1, SAMPLE)], [5]),
    encoded([(0, 0, 2, SAMPLE | RELAY)], [5]),
    encoded([(0, 0, 2, 0), (1, 0, -1, 0)], [5]),
    PlanBuilder(updates=[(0, 0, 200)]).encode(),
    PlanBuilder(updates=[(0, 40, 0)]).encode(),
    PlanBuilder(updates=[(8, 0, 0)]).encode(),
    PlanBuilder(updates=[(0, -1, 0)]).encode(),
    PlanBuilder(copies=[(0, 200)]).encode(),
    PlanBuilder(copies=[(-1, 0)]).encode(),
]


@pytest.mark.parametrize("plan", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_plan_is_refused(started, plan):
    with pytest.raises(ValueError, match="plan"):
        started.runner.step(plan)


def test_non_finite_logits_fail_their_rows_alone(saved, tmp_path):
    model = make_model("Llama")
    model.model.embed_tokens.weight.data[50] = float("nan")
    model.save_pretrained(tmp_path)
    prompts = {0: [7, 8, 9], 1: [7, 50, 9], 2: [11, 12]}
    with Started(spec_of(tmp_path), tmp_path) as started:
        driver = started.driver()
        tokens = driver.generate(prompts, 2)
        assert tokens[1] == [-1, -1]
        assert [list(details.failures) for details in driver.details] == [[1], [1]]
        assert "non-finite logits" in driver.details[0].failures[1]
        for slot in (0, 2):
            assert_greedy(model, prompts[slot], tokens[slot])


def test_device_and_ranks_are_checked():
    with pytest.raises(ConfigError, match="use device='cpu'"):
        Started(make_spec("default"), "", load_format="dummy", device="cuda")
    with pytest.raises(ConfigError, match=r"possible sizes: 1, 2, 4$"):
        Started(make_spec("default"), "", load_format="dummy", rank=0, world=3)
    with pytest.raises(ModelLoadError, match="heads of size 1024"):
        Started(make_spec("default", head_dim=1024), "", load_format="dummy")


def test_profile_bounds_what_a_step_touches(saved):
    small = Started(*saved[1:], max_num_batched_tokens=16).profiled
    large = Started(*saved[1:], max_num_batched_tokens=1024).profiled
    assert small.bytes_per_block == large.bytes_per_block == 2 * 3 * 2 * 4 * 16 * 4
    growth = (large.activation_bytes - small.activation_bytes) / (1024 - 16)
    # Per token, float32: the residual, the norm and the MLP's inner values at least; not a buffer for every
    # operation of the model.
    assert 4 * (2 * 64 + 96) <= growth <= 4 * (3 * 64 + 128 + 192 + 96)
    assert large.available_bytes > 0


def test_profile_counts_every_buffer_of_a_step(saved):
    """Those taken after the profile, and the float32 [positions, head size] of rotary cosines and sines."""
    with Started(*saved[1:], max_num_batched_tokens=64) as started:
        runner = started.runner
        taken = len(runner.backend._activations) + len(runner._sampler._workspace)
        rope = 4 * started.config.max_model_len * saved[1].head_dim
        assert taken > 0 and started.profiled.activation_bytes == taken + rope
