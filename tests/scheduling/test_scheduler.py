"""The scheduler's rules one by one; see `simulation`."""

import pytest

from asyncengine.errors import InvalidRequestError, QueueFullError
from asyncengine.params import SamplingParams
from asyncengine.scheduling.scheduler import Scheduler
from asyncengine.scheduling.sequence import Sequence, State, noise_key
from asyncengine.wire.plan import RELAY, SAMPLE

from .model import VOCABULARY
from .simulation import STORY, Simulation, rows


def test_noise_keys_are_splitmix64():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [noise_key(1234567, i) for i in range(4)] == known
    assert 0 <= noise_key(-(2**63), 1023) < 2**64


def test_prompts_are_cut_to_the_budget_and_decodes_go_first():
    s = Simulation(budget=10)
    s.request([1] * 4, ignore_eos=True)
    s.request([2] * 25, ignore_eos=True)
    assert rows(s) == [("r1.0", 0, 4, SAMPLE), ("r2.0", 0, 6, 0)]
    assert rows(s) == [("r1.0", 4, 1, SAMPLE | RELAY), ("r2.0", 6, 9, 0)]
    assert rows(s) == [("r1.0", 5, 1, SAMPLE | RELAY), ("r2.0", 15, 9, 0)]
    assert rows(s) == [("r1.0", 6, 1, SAMPLE | RELAY), ("r2.0", 24, 1, SAMPLE)]
    s.drain()


def test_nothing_is_planned_beyond_max_tokens():
    s = Simulation()
    s.request([1, 2], max_tokens=2, ignore_eos=True)
    assert len(rows(s)) == len(rows(s)) == 1
    assert rows(s) == []
    s.commit()
    assert rows(s) == []
    s.drain()
    assert s.worker.computed == 3


def test_a_stopped_sequence_is_out_at_once_and_its_late_result_dropped():
    s = Simulation(depth=3, caching=False)
    (seq,) = s.request([3, 3], stop_token_ids=tuple(range(1, VOCABULARY)))
    for _ in range(3):
        assert rows(s)
    s.commit()
    assert seq.state is State.FINISHED
    assert s.scheduler.num_free_blocks == s.scheduler.num_blocks
    (other,) = s.request([4, 4], ignore_eos=True, max_tokens=3)
    assert rows(s)
    s.commit()
    s.commit()
    assert s.received[other] == []
    s.drain()


def test_the_newest_gives_way_and_comes_back():
    s = Simulation(num_blocks=4, block_size=2, depth=1)
    first, second = (s.request([i, i, i], ignore_eos=True, max_tokens=5)[0] for i in (1, 2))
    assert len(rows(s)) == 2
    s.commit()
    assert len(rows(s)) == 2
    s.commit()
    assert [r[0] for r in rows(s)] == ["r1.0"]
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    assert s.scheduler.num_preemptions == 1
    assert s.scheduler.generated(second) == s.received[second] != []
    s.drain()


def test_who_gave_way_finds_what_it_generated_again():
    s = Simulation(num_blocks=6, block_size=2, depth=1)
    first, second = (s.request([i, i, i], ignore_eos=True, max_tokens=9)[0] for i in (1, 2))
    while not s.scheduler.num_preemptions:
        s.plan()
        s.commit()
    assert (second.state, len(second.tokens)) == (State.WAITING, 7)
    s.abort(first)
    s.plan()
    assert s.scheduler.prefix_hit_tokens == 4  # the first sequence took one of the three full blocks
    s.drain()


def test_priority_goes_first_and_waiting_makes_up_for_it():
    s = Simulation(max_num_seqs=1, policy="priority", depth=1)
    late = [s.request([1, 2], priority=p, max_tokens=1)[0] for p in (1, 0, -1)]
    order = []
    while s.scheduler.has_work:
        s.plan()
        order += s.table.running()
        s.commit()
    assert order == [late[2], late[1], late[0]]
    old = s.request([1, 2], priority=1, max_tokens=1)[0]
    s.clock += 4.0  # a point of priority is worth 3 seconds here
    new = s.request([1, 2], priority=0, max_tokens=1)[0]
    s.plan()
    assert s.table.running() == [old]
    s.drain()
    assert new.state is State.FINISHED


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
def test_siblings_share_the_prompt(length):
    s = Simulation(block_size=4, depth=1)
    seqs = s.request(STORY[:length], n=3, ignore_eos=True, max_tokens=6)
    assert [r[1:3] for r in rows(s)] == [(0, length)]
    assert s.scheduler.num_waiting == 2
    plan = s.scheduler.plan()
    assert plan.admitted == seqs[1:]
    _, made, _, copies, *_ = s.worker.parse(plan.data)
    assert len(copies) == (2 if (length - 1) % 4 else 0)
    assert [(r.start, r.count) for r in made if r.flags == SAMPLE] == [(length - 1, 1)] * 2
    shared = (length - 1) // 4
    tables = [s.table.blocks(q.slot) for q in seqs]
    assert all(t[:shared] == tables[0][:shared] for t in tables)
    assert len({t[shared] for t in tables}) == 3
    s.in_flight.append((s.worker.execute(plan.data, plan.admitted, set(), False), set()))
    before = [q.noise for q in seqs]
    assert len(set(before)) == 3
    s.drain()


def test_siblings_outlive_their_first():
    s = Simulation(depth=1, max_num_seqs=2)
    first, *others = s.request(STORY[:9], n=4, ignore_eos=True, max_tokens=3)
    s.plan()
    s.abort(first)
    s.drain()
    assert all(q.finish_reason == "length" for q in others)
    first, *others = s.request(STORY[:9], n=3, ignore_eos=True, max_tokens=3)
    s.abort(first)
    s.abort(others[0])
    s.drain()


def test_cached_prefixes_are_not_computed_again_until_they_are_reset():
    s = Simulation(block_size=4)
    prompt = STORY[:16]
    (a,) = s.request(prompt, max_tokens=1)
    s.drain()
    before = s.worker.computed
    (b,) = s.request(prompt, max_tokens=1)
    s.drain()
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 12)
    assert s.worker.computed - before == 4
    (salted,) = s.request(prompt, salt=b"other", max_tokens=1)
    s.drain()
    assert salted.num_cached_tokens == 0
    s.scheduler.reset_prefix_cache()
    (running,) = s.request(prompt, ignore_eos=True, max_tokens=12)
    s.plan()
    s.scheduler.reset_prefix_cache()
    s.drain()
    (c,) = s.request(prompt, max_tokens=1)
    s.drain()
    assert running.num_cached_tokens == c.num_cached_tokens == 0
    assert s.scheduler.prefix_hit_tokens == 12


def test_a_failed_row_ends_its_sequence_alone_and_its_blocks_are_not_found():
    s = Simulation(failures=True, depth=1)
    (bad,) = s.request(STORY[:9], ignore_eos=True, max_tokens=5)
    (good,) = s.request([1, 1], ignore_eos=True, max_tokens=5)
    s.plan()
    s.commit()
    assert s.scheduler.num_cached_blocks == 2
    s.plan(frozenset({0}))
    s.commit()
    assert bad.finish_reason == "error" and bad.error == "row of slot 0"
    assert good.state is State.RUNNING
    (again,) = s.request(STORY[:9], max_tokens=5)
    s.drain()
    assert again.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "fields", "parameter", "message"),
    [
        ([], {}, "prompt", "1 to 47"),
        ([1] * 48, {}, "prompt", "context of 48"),
        ([1] * 40, {}, "prompt", "KV memory holds 32"),
        ([1] * 10, {"max_tokens": 24}, "max_tokens", "at most 23 tokens"),
        ([2**31], {}, "prompt", "32-bit"),
        ([1], {"stop_token_ids": (2**40,)}, "stop_token_ids", "32-bit"),
    ],
)
def test_what_can_never_run_is_refused(prompt, fields, parameter, message):
    s = Simulation(num_blocks=8)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        s.request(prompt, **fields)
    assert caught.value.parameter == parameter
    assert not s.scheduler.has_work


def test_what_just_fits_runs_alone():
    s = Simulation(num_blocks=8, max_num_seqs=4)
    (exact,) = s.request([1] * 10, max_tokens=23, ignore_eos=True)
    (open_end,) = s.request([1] * 32, ignore_eos=True)
    s.drain()
    assert len(s.scheduler.generated(exact)) == 23
    assert len(s.scheduler.generated(open_end)) == 1


def test_queues_are_bounded():
    def fill(**bounds) -> int:
        scheduler = Scheduler(
            num_blocks=100,
            block_size=4,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            max_model_len=64,
            **bounds,
        )
        accepted = 0
        with pytest.raises(QueueFullError, match="try again later"):
            for i in range(100):
                seq = Sequence(str(i), [1] * 10, SamplingParams(), seed=i, arrival=float(i))
                scheduler.add([seq])
                accepted += 1
                scheduler.plan()
        assert scheduler.num_running + scheduler.num_waiting == accepted
        return accepted

    assert fill(max_queued_requests=3) == 5  # two run
    assert fill(max_queued_requests=0) == 2
    assert fill(max_queued_tokens=25) == 4
    assert fill(max_queued_tokens=5) == 3  # one may always wait


def test_results_must_answer_the_oldest_step():
    s = Simulation()
    with pytest.raises(RuntimeError, match="no step is in flight"):
        s.scheduler.commit(bytes(36))
    s.request([1, 2], ignore_eos=True)
    s.plan()
    s.plan()
    good = s.in_flight[0][0]
    for wrong in (b"", good[:31], good + b"\0", good[:-4], s.in_flight[1][0], b"\1" + good[1:]):
        with pytest.raises(RuntimeError):
            s.scheduler.commit(wrong)
    s.scheduler.commit(memoryview(good))
    s.scheduler.check()
