"""Prompt lookup against plain Python, and what drafts and waiting are worth on simulated machines."""

import random
import struct
import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine._fast.slots import BlockPool, SlotTable
from asyncengine.scheduling.step_cost import StepCost
from asyncengine.wire.plan import SAMPLE, VERIFY

from .simulation import Simulation

COUNT = 8
FREE = array("d", [1.0] * 65)
"""Times of steps by draft tokens, on a machine where these cost nothing."""


class Reference:
    """The rule in plain Python: how it comes to a draft, and how it learns."""

    def __init__(self, most, least):
        self.most, self.least = most, least
        self.source, self.rate = None, 0.5

    def draft(self, tokens):
        known = len(tokens)
        if self.source is None:
            for n in range(min(self.most, known - 1), self.least - 1, -1):
                ends = [e for e in range(n, known) if tokens[e - n : e] == tokens[known - n :]]
                if ends:
                    self.source = ends[-1]
                    break
        if self.source is None:
            return []
        copy = list(tokens)
        while len(copy) < known + COUNT and self.rate ** (len(copy) - known + 1) >= 1 / 16:
            copy.append(copy[self.source + len(copy) - known])
        return copy[known:]

    def take(self, tokens, token):
        """`token` follows `tokens`. Whether that was predicted."""
        if self.source is None:
            return False
        hit = tokens[self.source] == token
        self.rate += (hit - self.rate) / 8
        self.source = self.source + 1 if hit else None
        return hit


class Alone:
    """A table with one sequence, and the answers of a worker as the caller likes them."""

    def __init__(self, prompt, most, least, num_blocks=400):
        pool = BlockPool(num_blocks, 16, bytes(range(16)))
        self.table = SlotTable(pool, 2, lookup=(COUNT, most, least))
        self.table.begin(200_000)
        self.slot, _ = self.table.admit(
            None, array("i", prompt), b"", max_len=16 * num_blocks, min_len=0, stop_ids=array("i"),
            ignore_eos=True, rank=(0.0, 0), drafting=True,
        )  # fmt: skip
        self.table.finish()

    def plan(self, times=FREE):
        """The draft tokens of the next row."""
        self.table.look_up()
        self.table.begin(1000, times)
        assert self.table.plan_running()
        words = array("i", self.table.finish())
        rows, inline = words[2:4]
        assert rows == 1
        count, flags = words[10:12]
        assert bool(flags & VERIFY) == (count > 1) and flags & SAMPLE
        return words[len(words) - inline :].tolist()[1:]

    def answer(self, tokens):
        """The tokens that the sequence got."""
        head = struct.pack("<8i", 0, self.table.step, len(tokens), 0, 1, 0, 0, 0)
        progressed, got, ended, _ = self.table.commit(head + array("i", tokens).tobytes())
        assert len(progressed) == len(got) and not ended
        self.table.check()
        return got


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=3, max_size=200),
    repeats=st.integers(1, 3),
    lengths=st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 2), (8, 3)]),
)
def test_drafts_follow_the_latest_of_the_longest_matches(text, repeats, lengths):
    text = text * repeats
    alone, reference = Alone(text[:1], *lengths), Reference(*lengths)
    assert alone.answer([text[1]]) == [text[1]]
    at = 2
    while at + COUNT < len(text):
        drafts = alone.plan()
        assert drafts == reference.draft(text[:at])
        drawn = text[at : at + len(drafts) + 1]
        right = 0
        while right < len(drafts) and drafts[right] == drawn[right]:
            right += 1
        # What is drawn after a wrong draft is nonsense, and nobody looks at it.
        assert alone.answer(drawn[: right + 1] + [77] * (len(drafts) - right)) == drawn[: right + 1]
        for token in drawn[: right + 1]:
            reference.take(text[:at], token)
            at += 1
        assert alone.table.known_len(alone.slot) == at


def test_text_that_repeats_itself_soon_is_drafted_as_often_as_one_likes():
    alone = Alone([5, 6, 7], 3, 1)
    alone.answer([5])
    drafts = alone.plan()
    assert len(drafts) > 3 and drafts == [6, 7, 5, 6, 7, 5, 6, 7][: len(drafts)]


def test_a_draft_never_exceeds_the_sequences_end():
    alone = Alone([3] * 12, 2, 1, num_blocks=1)  # room for 16 tokens
    alone.answer([3])
    assert alone.plan() == [3, 3]
    assert alone.table.blocks(alone.slot) == [0]


def test_a_long_prompt_is_indexed_in_pieces():
    numbers = random.Random(1)
    prompt = [numbers.randrange(50_000) for _ in range(100_000)]
    prompt += prompt[5_000:5_004]
    alone = Alone(prompt, 4, 2, num_blocks=6_400)
    alone.answer([prompt[5_004]])
    waits, longest = 0, 0.0
    while True:
        begin = time.thread_time()
        alone.table.look_up()
        longest = max(longest, time.thread_time() - begin)
        drafts = alone.plan()
        if drafts:
            break
        waits += 1
        alone.answer([prompt[5_005 + waits - 1]])
    # Those who draw what stands in the text get on with it as soon as the index is there.
    assert drafts == prompt[5_005 + waits :][: len(drafts)]
    assert 2 < waits < 20 and longest < 0.02


def test_lookup_is_checked():
    pool = BlockPool(4, 4, bytes(16))
    for lookup in ((0, 2, 1), (4, 1, 2), (4, 33, 1), (4, 2, 0)):
        with pytest.raises(ValueError):
            SlotTable(pool, 1, lookup=lookup)


# -- what it is worth ------------------------------------------------------------------------------------


def test_drafts_stop_where_they_cost_more_than_they_give():
    """A token more costs nothing up to four of them, then half a step each."""
    knee = array("d", [1.0] * 5 + [1.0 + 0.5 * i for i in range(1, 60)])
    alone = Alone([1, 2, 3] * 20, 3, 1)
    alone.answer([1])
    for token in [2, 3, 1] * 10:  # its predictions come true: by and by it is sure of them
        alone.plan(array("d", [1.0]))
        alone.answer([token])
    # At a chance of nearly 1, five tokens in 1.0 become six in 1.5.
    assert len(alone.plan(knee)) == 4
    alone.answer([2, 3, 1, 2, 3])
    assert len(alone.plan(array("d", [1.0 + 0.1 * i for i in range(60)]))) == COUNT
    alone.answer([1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert alone.plan(array("d", [1.0 + 1.0 * i for i in range(60)])) == []


def machine(tokens, knee=12, noise=None):
    """Microseconds of a step that is bound by reading weights up to `knee` tokens, then by computing."""
    return 4000.0 * max(1.0, tokens / knee) * (1.0 if noise is None else noise.uniform(0.9, 1.5))


def learn(cost, sizes, noise=None):
    for tokens in sizes:
        cost.observe(tokens, machine(tokens, noise=noise))
    return cost


def test_times_are_learned():
    noise = random.Random(3)
    cost = learn(StepCost(), [1, 4, 9, 16, 40, 72] * 40, noise)
    times = cost.times(1, 64)
    assert len(times) == 65 and list(times) == sorted(times)
    for tokens in (1, 4, 9, 16, 40, 65):
        assert times[tokens - 1] == pytest.approx(1.2 * machine(tokens), rel=0.3)


def test_what_is_unknown_is_tried_and_what_is_forgotten_is_tried_again():
    cost = StepCost()
    assert len(set(cost.times(1, 8))) == 1
    cost.observe(1, 1000.0)
    assert list(cost.times(1, 8)) == [1000.0] * 9
    cost.observe(9, 9000.0)
    assert list(cost.times(1, 8)) == pytest.approx([1000.0 * n for n in range(1, 10)])
    for _ in range(600):
        cost.observe(1, 1000.0)
    assert list(cost.times(1, 8)) == [1000.0] * 9


def test_one_slow_step_is_forgiven():
    cost = learn(StepCost(), [1, 9] * 20)
    cost.observe(9, 1e7)
    assert cost.times(1, 8)[8] <= 1.2 * machine(9)


def test_waiting_pays_where_the_gain_exceeds_the_gap():
    cost = StepCost()
    for _ in range(40):
        cost.observe_gap(400.0)
    # A step of 4 ms, with the gap a tenth more.
    assert cost.worth_waiting(1.2, 4000.0, 4000.0) and not cost.worth_waiting(1.05, 4000.0, 4000.0)
    assert cost.worth_waiting(3.0, 8000.0, 4000.0) and not cost.worth_waiting(2.0, 8000.0, 4000.0)
    for _ in range(100):
        cost.observe_gap(40_000.0)  # the host's loop is blocked
    assert not cost.worth_waiting(5.0, 4000.0, 4000.0)
    tries = 0
    while not cost.worth_waiting(5.0, 4000.0, 4000.0):
        tries += 1
    assert 20 < tries < 500


# -- in the scheduler ------------------------------------------------------------------------------------


def circular_seed():
    """A request whose model goes round in a circle most of the time; see `model.draw`."""
    s = Simulation()
    while True:
        (seq,) = s.request([1], max_tokens=1)
        if seq.noise % 2:
            return s.clock - 1.0


def run_one(lookup, **fields):
    s = Simulation(lookup=lookup, max_model_len=200, num_blocks=200)
    s.clock = circular_seed()
    s.request([1, 2, 3, 4, 5, 6] * 3, ignore_eos=True, max_tokens=100, **fields)
    s.drain()
    return s


def test_text_that_repeats_takes_fewer_steps():
    plain, drafted = run_one(None), run_one((8, 3, 1))
    assert plain.worker.steps == 100
    assert drafted.worker.steps < 50
    s = drafted.scheduler
    assert drafted.worker.steps + s.num_accepted_tokens == 100
    assert s.num_drafts <= s.num_draft_tokens


def test_penalties_are_not_drafted_for():
    assert run_one((8, 3, 1), repetition_penalty=1.5).scheduler.num_drafts == 0


def test_others_go_on_while_one_waits_for_its_own_result():
    """Where the batch does not wait as a whole, who is drafted for misses every other step."""
    s = Simulation(lookup=(8, 3, 1), max_model_len=200, num_blocks=200, waits=False)
    (other,) = s.request([1], ignore_eos=True, max_tokens=60, repetition_penalty=2.0)
    s.clock = circular_seed()
    (drafted,) = s.request([1, 2, 3, 4, 5, 6] * 3, ignore_eos=True, max_tokens=60)
    done = []
    while s.scheduler.has_work:
        while len(s.in_flight) < s.depth and s.plan():
            pass
        s.commit()
        done += [seq for seq in (drafted, other) if seq.finish_reason and seq not in done]
    assert done == [drafted, other]
    assert s.worker.steps <= 62
    assert s.scheduler.num_accepted_tokens > 20
