"""Plans written into a step's arrays, against a model in plain Python."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.wire.plan import RELAY, SAMPLE, VERIFY
from asyncengine.worker.batch import Batch

from .plans import PlanBuilder, slot_init

SLOTS, TOKENS, LENGTH, SAMPLES, BLOCK, BLOCKS = 5, 40, 64, 20, 16, 9


def batch() -> Batch:
    return Batch(SLOTS, TOKENS, LENGTH, SAMPLES, BLOCK, BLOCKS)


@st.composite
def plans(draw: st.DrawFn) -> PlanBuilder:
    plan = PlanBuilder(draw(st.integers(0, 9)), draw(st.integers(0, 2**31 - 1)))
    slots = draw(st.permutations(range(SLOTS)))[: draw(st.integers(0, SLOTS))]
    relayed = draw(st.integers(0, len(slots)))
    for slot in slots[:relayed]:
        plan.relay(slot, draw(st.integers(0, LENGTH - 1)), draw(st.booleans()))
    for slot in slots[relayed:]:
        tokens = draw(st.lists(st.integers(0, 999), min_size=1, max_size=7))
        start = draw(st.integers(0, LENGTH - len(tokens)))
        if len(tokens) <= 4 and draw(st.booleans()):
            plan.verify(slot, start, tokens)
        else:
            plan.inline(slot, start, tokens, draw(st.booleans()))
    update = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 3), st.integers(0, BLOCKS - 1))
    plan.updates = draw(st.lists(update, max_size=6))
    block = st.integers(0, BLOCKS - 1)
    plan.copies = draw(st.lists(st.tuples(block, block), max_size=3))
    plan.inits = [slot_init(slot, 3) for slot in draw(st.sets(st.integers(0, SLOTS - 1), max_size=2))]
    return plan


@settings(max_examples=200, deadline=None)
@given(st.lists(plans(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_plans_follow_the_model(steps: list[PlanBuilder], random: object) -> None:
    real, table, last = batch(), np.zeros((SLOTS, LENGTH // BLOCK), int), [0] * SLOTS
    for plan in steps:
        copies, inits = real.prepare(plan.encode())
        assert copies.tolist() == [list(pair) for pair in plan.copies] and inits == plan.inits
        for slot, index, block in plan.updates:
            table[slot, index] = block
        ids, positions, rows, starts, sampled = [], [], [], [0], []
        inline = iter(plan.tokens)
        for number, (slot, start, count, flags) in enumerate(plan.rows):
            ids += [last[slot]] if flags & RELAY else [next(inline) for _ in range(count)]
            positions += range(start, start + count)
            rows += [number] * count
            starts.append(len(ids))
            wanted = count if flags & VERIFY else 1 if flags & SAMPLE else 0
            sampled += [(len(ids) - i, slot, positions[-i] + 1) for i in range(wanted, 0, -1)]
        inputs = real.inputs
        assert (inputs.epoch, inputs.step) == (plan.epoch, plan.step)
        assert (inputs.num_rows, inputs.num_tokens, inputs.num_samples) == (
            len(plan.rows),
            len(ids),
            len(sampled),
        )
        assert real.token_ids[: len(ids)].tolist() == ids
        assert real.positions[: len(ids)].tolist() == positions
        assert real.token_row[: len(ids)].tolist() == rows
        assert real.query_start[: len(starts)].tolist() == starts
        assert real.row_slot[: len(plan.rows)].tolist() == [row[0] for row in plan.rows]
        assert real.context_len[: len(plan.rows)].tolist() == [row[1] + row[2] for row in plan.rows]
        np.testing.assert_array_equal(real.block_table, table)
        assert [
            *zip(
                real.sample_rows[: len(sampled)].tolist(),
                real.sample_slots.tolist(),
                real.sample_positions.tolist(),
                strict=True,
            )
        ] == sampled
        drawn = [random.randrange(1000) for _ in sampled]  # type: ignore[attr-defined]
        tokens = np.array([*drawn, -7], np.int32)
        inputs.keep(tokens)
        for (_, slot, _), token in zip(sampled, drawn, strict=True):
            last[slot] = token
        result = inputs.result(tokens, b"more", 12345)
        header = (plan.epoch, plan.step, len(drawn), 4, 12345, 0, 0, 0)
        assert result == struct.pack(f"<{8 + len(drawn)}i", *header, *drawn) + b"more"


def row(slot: int = 0, start: int = 0, count: int = 1, flags: int = SAMPLE) -> PlanBuilder:
    plan = PlanBuilder()
    plan.rows = [(slot, start, count, flags)]
    plan.tokens = [] if flags & RELAY else [7] * min(max(count, 0), 99)
    return plan


def many(*parts: PlanBuilder) -> PlanBuilder:
    plan = PlanBuilder()
    for part in parts:
        plan.rows += part.rows
        plan.tokens += part.tokens
    return plan


OUT_OF_BOUNDS = [
    row(slot=SLOTS),
    row(slot=-1),
    row(start=-1),
    row(start=LENGTH),
    row(start=2**31 - 1, count=2),
    row(count=0),
    row(count=-1),
    row(start=LENGTH - 1, count=2),
    row(flags=8),
    row(flags=-1),
    row(count=2, flags=RELAY),
    row(count=TOKENS + 1),
    many(row(), row(1, flags=RELAY)),
    many(*[row(slot) for slot in [0, 1, 2, 3, 4, 0]]),
    row(count=SAMPLES + 1, flags=SAMPLE | VERIFY),
    PlanBuilder(tokens=[1]),
    PlanBuilder(updates=[(SLOTS, 0, 0)]),
    PlanBuilder(updates=[(0, LENGTH // BLOCK, 0)]),
    PlanBuilder(updates=[(0, 0, BLOCKS)]),
    PlanBuilder(updates=[(0, -1, 0)]),
    PlanBuilder(copies=[(0, BLOCKS)]),
    PlanBuilder(copies=[(-1, 0)]),
]


@pytest.mark.parametrize("plan", OUT_OF_BOUNDS, ids=str)
def test_a_plan_out_of_bounds_writes_nothing(plan: PlanBuilder) -> None:
    real = batch()
    good = row(3, 5, 2)
    good.updates = [(1, 1, 4)]
    real.prepare(good.encode())
    names = ("block_table", "last_token", "token_ids", "positions", "token_row", "query_start", "context_len")
    before = {name: getattr(real, name).copy() for name in names}
    plan.updates = [(2, 2, 2), *plan.updates]
    with pytest.raises(ValueError, match="out of bounds"):
        real.prepare(plan.encode())
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(real, name), values)
    assert real.inputs.num_tokens == 2


def test_what_is_not_one_whole_plan() -> None:
    real, data = batch(), row().encode()
    for bad, words in [
        (b"", "no header"),
        (data[:31], "no header"),
        (data[:-1], "header tells"),
        (data + b"x", "header tells"),
        (struct.pack("<8i", 0, 0, -1, 4, 0, 0, 0, 0), "header tells"),
        (struct.pack("<8i", 0, 0, 2**31 - 1, 0, 0, 0, 0, 0), "header tells"),
        (struct.pack("<8i", 0, 0, 0, 0, 0, 0, -1, 0), "header tells"),
    ]:
        with pytest.raises(ValueError, match=words):
            real.prepare(bad)
    with pytest.raises(ValueError, match="at least one"):
        Batch(0, TOKENS, LENGTH, SAMPLES, BLOCK, BLOCKS)
