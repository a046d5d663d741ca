"""The sampler's slot state against a plain model of the sampling rules in float64."""

import numpy as np
import pytest

from asyncengine._fast.cpu import Buffer, Team
from asyncengine.worker.sampler import HeadModes, Sampler

from ..noise import gumbel
from .plans import PlanBuilder, slot_init
from .tiny import Started, make_model, prompt, reference_logits, spec_of

VOCAB = 97


def model_draw(logits, init, known, position):
    """The token that `SamplingParams` promises, by sorting."""
    x = logits.astype(np.float64)
    output, inside = known[init.prompt_len :], set(known)
    for token in range(VOCAB):
        if token in inside:
            penalty = init.repetition_penalty
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        x[token] -= init.frequency_penalty * output.count(token) + init.presence_penalty * (token in output)
    if position < init.min_len:
        x[[token for token in init.stop_ids if token < VOCAB]] = -np.inf
    if init.temperature == 0:
        return int(x.argmax())
    x /= init.temperature
    order = np.argsort(-x, kind="stable")
    kept = order[: init.top_k or VOCAB]
    mass = np.exp(x[kept] - x[kept[0]])
    mass /= mass.sum()
    before = np.cumsum(mass) - mass
    kept = kept[(before < init.top_p) & (mass >= init.min_p * mass[0])]
    return int(max(kept, key=lambda token: x[token] + gumbel(init.seed, position, int(token))))


@pytest.fixture(scope="module")
def team():
    return Team(2)


class Bench:
    """A sampler fed with made-up logits, and the model of what it should do."""

    def __init__(self, team, slots=6, seed=0):
        self.rng = np.random.default_rng(seed)
        self.sampler = Sampler(team, slots, VOCAB)
        self.memory = Buffer(4 * VOCAB * slots)
        self.inits, self.known = {}, {}

    def enter(self, slot, known, prompt_len, **fields):
        init = slot_init(slot, prompt_len, history=list(known), **fields)
        self.inits[slot], self.known[slot] = init, list(known)
        self.sampler.enter(init)

    def step(self, slots):
        logits = np.frombuffer(self.memory, np.float32)[: len(slots) * VOCAB].reshape(-1, VOCAB)
        logits[:] = self.rng.normal(0, 2, logits.shape)
        positions = np.array([len(self.known[slot]) for slot in slots], np.int32)
        tokens = np.zeros(len(slots), np.int32)
        details = self.sampler.draw(self.memory.address, np.array(slots, np.int32), positions, tokens)
        for row, (slot, position) in enumerate(zip(slots, positions.tolist(), strict=True)):
            expected = model_draw(logits[row], self.inits[slot], self.known[slot], position)
            assert tokens[row] == expected, (slot, self.inits[slot])
            self.known[slot].append(expected)
        return logits.astype(np.float64), tokens, details


RULES = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "seed": 2**64 - 1},
    {"temperature": 1.0, "min_p": 0.1, "seed": 99},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.5, "temperature": 0.5},
    {"presence_penalty": -2.0, "frequency_penalty": 0.5},
]


def test_mixed_rows_follow_the_model(team):
    bench = Bench(team, slots=len(RULES))
    for slot, rule in enumerate(RULES):
        bench.enter(slot, prompt(4 + slot, VOCAB), 4 + slot, **rule)
    for _ in range(40):
        count = bench.rng.integers(1, len(RULES) + 1)
        bench.step(bench.rng.permutation(len(RULES))[:count].tolist())


def test_history_of_a_resumed_sequence_counts_as_output(team):
    rule = {"presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2}
    bench = Bench(team)
    bench.enter(2, [5, 6, 7, 7, 8, 8, 8], 3, **rule)
    for _ in range(10):
        bench.step([2])
    bench.enter(0, bench.known[2], 3, **rule)
    for _ in range(10):
        bench.step([0])


def test_a_reused_slot_has_nothing_of_the_last_sequence(team):
    bench = Bench(team)
    stale = dict(
        temperature=1.0, top_k=1, repetition_penalty=3.0, presence_penalty=2.0, logprobs=5, min_len=10**6,
        stop_ids=list(range(VOCAB - 1)), seed=5,
    )  # fmt: skip
    for fresh in RULES:
        bench.enter(1, prompt(9, VOCAB), 9, **stale)
        assert bench.step([1])[2] is not None
        bench.enter(1, prompt(3, VOCAB), 3, **fresh)
        assert bench.step([1])[2] is None


def test_stop_ids_wait_for_min_len(team):
    bench = Bench(team)
    every_other = list(range(0, VOCAB, 2))
    bench.enter(0, prompt(4, VOCAB), 4, min_len=7, stop_ids=every_other)
    bench.enter(1, prompt(2, VOCAB), 2, min_len=4, stop_ids=[*every_other, VOCAB, 2**31 - 1])
    bench.enter(2, prompt(2, VOCAB), 2)
    drawn = np.array([bench.step([2, 1, 0])[1] for _ in range(12)])
    assert (drawn[:3, 2] % 2 == 1).all() and (drawn[:2, 1] % 2 == 1).all()
    assert (drawn[3:, 2] % 2 == 0).any() and (drawn[2:, 1] % 2 == 0).any()


def test_logprobs_are_of_the_raw_distribution(team):
    bench = Bench(team)
    bench.enter(0, [1, 2], 2, logprobs=4, temperature=2.0, top_k=3, repetition_penalty=1.4)
    bench.enter(1, [1, 2], 2)
    bench.enter(2, [1, 2], 2, logprobs=0)
    for _ in range(5):
        logits, tokens, details = bench.step([2, 1, 0])
        raw = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert sorted(details.logprobs) == [0, 2] and details.failures == {}
        for row, count in ((0, 0), (2, 4)):
            got, order = details.logprobs[row], np.argsort(-raw[row], kind="stable")
            assert got.sampled == pytest.approx(raw[row, tokens[row]], abs=1e-5)
            assert got.rank == 1 + order.tolist().index(tokens[row])
            assert got.top_ids == order[:count].tolist()
            assert got.top_logprobs == pytest.approx(raw[row, order[:count]].tolist(), abs=1e-5)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"temperature": 1.0}, {"repetition_penalty": 1.1}])
def test_non_finite_rows_fail_alone(team, fields):
    sampler, memory = Sampler(team, 3, VOCAB), Buffer(4 * VOCAB * 3)
    logits = np.frombuffer(memory, np.float32).reshape(3, VOCAB)
    logits[:] = np.random.default_rng(0).normal(0, 1, logits.shape)
    logits[1, 40] = np.nan
    for slot in range(3):
        sampler.enter(slot_init(slot, 1, history=[3], **fields))
    tokens = np.zeros(3, np.int32)
    details = sampler.draw(memory.address, np.arange(3, dtype=np.int32), np.ones(3, np.int32), tokens)
    assert tokens[1] == -1 and min(tokens[0], tokens[2]) >= 0
    assert list(details.failures) == [1] and "non-finite" in details.failures[1]
    assert sorted(details.logprobs) == ([0, 2] if "logprobs" in fields else [])


def test_head_modes_name_what_a_row_needs(team):
    sampler = Sampler(team, 8, VOCAB)
    fields = [
        {},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 0.7, "top_k": 65},
        {"temperature": 1.0},
        {"logprobs": 0},
        {"presence_penalty": 0.5, "history": [1]},
        {"min_len": 9, "stop_ids": [5]},
        {"temperature": 1e-6, "top_k": 30},
    ]
    for slot, rule in enumerate(fields):
        sampler.enter(slot_init(slot, 1, **rule))
    slots = np.array([0, 1, 2, 3, 4, 5, 6, 6, 7, 1], np.int32)
    positions = np.array([5, 5, 5, 5, 5, 5, 8, 9, 5, 6], np.int32)
    modes = HeadModes(np.zeros(12, np.int32), np.zeros(12, np.float32))
    sampler.head_modes(slots, positions, modes)
    assert modes.k.tolist() == [1, 40, -1, -1, -1, -1, -1, 1, 1, 40, 0, 0]
    assert modes.temperature[[0, 1, 7, 8, 9]] == pytest.approx([1, 0.7, 1, 1, 0.7])
    sampler.enter(slot_init(4, 1))
    sampler.head_modes(slots, positions, modes)
    assert modes.k[4] == 1


def test_a_slot_with_several_rows_counts_all_its_tokens(team):
    bench = Bench(team)
    bench.enter(0, [1, 2], 2, frequency_penalty=2.0)
    logits = np.frombuffer(bench.memory, np.float32)[: 3 * VOCAB].reshape(3, VOCAB)
    logits[:] = 0
    logits[:, 7] = 3.0
    tokens = np.zeros(3, np.int32)
    slots, positions = np.zeros(3, np.int32), np.arange(2, 5, dtype=np.int32)
    bench.sampler.draw(bench.memory.address, slots, positions, tokens)
    assert tokens.tolist() == [7, 7, 7]
    bench.sampler.draw(bench.memory.address, slots[:1], positions[:1], tokens[:1])
    assert tokens[0] == 0  # 3 - 2 * 3 < 0


def test_penalties_need_the_history(team):
    with pytest.raises(ValueError, match="no history"):
        Sampler(team, 1, VOCAB).enter(slot_init(0, 1, presence_penalty=1.0))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    model = make_model("Llama")
    model.save_pretrained(directory)
    with Started(spec_of(directory), directory) as started:
        yield model, started


def test_seeded_sequences_draw_the_same_alone_in_a_batch_and_in_chunks(started):
    fields = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}
    prompts = {slot: prompt(5 + 3 * slot) for slot in range(8)}
    run = started[1]
    together = run.driver().generate(prompts, 12, **fields)
    assert run.driver().generate(prompts, 12, chunk=4, stagger=1, **fields) == together
    for slot in (0, 5):
        # In another slot, and so beside other neighbours.
        assert run.driver().generate({7 - slot: prompts[slot]}, 12, **fields)[7 - slot] == together[slot]


def test_logprobs_of_the_model(started):
    model, run = started
    ids = prompt(30)
    driver = run.driver()
    tokens = driver.generate({2: ids}, 4, logprobs=3)[2]
    logits = reference_logits(model, ids + tokens)[len(ids) - 1 : -1].astype(np.float64)
    raw = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, token, details in zip(raw, tokens, driver.details, strict=True):
        got = details.logprobs[0]
        assert got.rank == 1 and got.top_ids == np.argsort(-row)[:3].tolist()
        assert got.sampled == pytest.approx(row[token], abs=1e-4)
        assert got.top_logprobs == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)


def test_resuming_after_preemption_draws_the_same(started):
    """A sequence loses its slot and is recomputed from its known tokens, those in flight dropped."""
    run, ids = started[1], prompt(17)
    fields = {"temperature": 1.2, "seed": 3, "frequency_penalty": 0.8, "presence_penalty": 0.3}
    whole = run.driver().generate({0: ids}, 10, history=ids, **fields)[0]
    driver = run.driver()
    known = ids + whole[:4]
    plan = PlanBuilder(inits=[slot_init(3, len(ids), history=known, **fields)])
    plan.inline(3, 0, known, sample=True)
    driver.extend(plan, 3, len(known))
    tokens = driver.send(plan)
    for position in range(len(known), len(ids) + 9):
        plan = PlanBuilder()
        plan.relay(3, position)
        driver.extend(plan, 3, position + 1)
        tokens += driver.send(plan)
    assert tokens == whole[4:]
