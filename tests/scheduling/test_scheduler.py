"""The scheduler against a plain-Python worker that checks every key and value it attends to.

The language model is a pure function of the tokens before, so each sequence must give exactly what it
gives when it is run alone, whatever batching, chunking, caching, forking and preemption did meanwhile.
"""

import random
from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine.config import NgramSpeculation
from asyncengine.errors import InvalidRequestError, QueueFullError
from asyncengine.params import SamplingParams
from asyncengine.scheduling.scheduler import Scheduler
from asyncengine.scheduling.sequence import Sequence, State, noise_key
from asyncengine.wire.plan import RELAY, SAMPLE, VERIFY

from .model import EOS, VOCABULARY, Worker


def speculation(count: int, most: int, least: int) -> NgramSpeculation:
    return NgramSpeculation(num_speculative_tokens=count, prompt_lookup_max=most, prompt_lookup_min=least)


STORY = [hash((7, i)) % VOCABULARY for i in range(64)]


class Simulation:
    """An engine without an event loop: requests come and go, steps are planned ahead of results."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_model_len: int = 48,
        depth: int = 2,
        caching: bool = True,
        policy: str = "fcfs",
        failures: bool = False,
        lookup: tuple[int, int, int] | None = None,
        waits: bool = True,
    ) -> None:
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_ids=[EOS],
            enable_prefix_caching=caching,
            policy=policy,
            ageing=3.0,
            speculation=None if lookup is None else speculation(*lookup),
        )
        self.drafts = 0 if lookup is None else min(64, lookup[0] * max_num_seqs)
        if lookup is not None and not waits:  # then rows miss steps instead
            self.scheduler._cost.worth_waiting = lambda *args: False
        self.table, self.pool = self.scheduler._table, self.scheduler._pool
        self.worker = Worker(num_blocks, block_size)
        self.block_size, self.budget, self.depth, self.failures = block_size, budget, depth, failures
        self.in_flight: deque[tuple[bytes, set[Sequence]]] = deque()
        self.verifying: set[Sequence] = set()
        self.live: list[Sequence] = []
        self.received: dict[Sequence, list[int]] = {}
        self.clock = 0.0
        self.operations = 0
        self.ended = 0

    def request(self, prompt: list[int], n: int = 1, priority: int = 0, salt: bytes = b"", **fields) -> list:
        self.clock += 1.0
        params = SamplingParams(n=n, **fields)
        made: list[Sequence] = []
        for i in range(n):
            made.append(
                Sequence(
                    f"r{self.clock}",
                    made[0].tokens if made else prompt,
                    params,
                    seed=int(self.clock),
                    arrival=self.clock,
                    index=i,
                    priority=priority,
                    cache_salt=salt,
                )
            )
        self.scheduler.add(made)
        self.live += made
        self.received.update((s, []) for s in made)
        return made

    def plan(self, failing: frozenset[int] = frozenset(), details: bool = False) -> bool:
        before = {id(s) for s in self.table.running()}
        self.verifying &= set(self.table.running())  # not who gave way
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "work is left and nothing moves"
            return False
        header, rows, *_, inits = self.worker.parse(plan.data)
        assert header[1] == plan.step
        running = self.table.running()
        assert [s.rank for s in running] == sorted(s.rank for s in running)
        assert sum(r.count for r in rows) <= self.budget
        drafted = [r for r in rows if r.flags & VERIFY]
        assert sum(r.count - 1 for r in drafted) <= self.drafts
        # Who verifies knows all of its tokens, and has nothing else in flight.
        owner = {s.slot: s for s in running}
        assert not {owner[r.slot] for r in rows} & self.verifying
        assert all(r.start == self.table.known_len(r.slot) - 1 for r in drafted)
        verified = {owner[r.slot] for r in drafted}
        self.verifying |= verified
        assert len(inits) == sum(id(s) not in before for s in running)
        for row in rows:
            blocks = self.table.blocks(row.slot)
            for i in range(row.start // self.block_size, (row.start + row.count - 1) // self.block_size + 1):
                assert self.pool.refs(blocks[i]) == 1, "a shared block is written"
                assert not self.pool.is_cached(blocks[i]), "a published block is written"
        # Plans are executed in order, so it makes no difference that this one is executed already.
        result = self.worker.execute(plan.data, plan.admitted, failing, details)
        self.in_flight.append((result, verified))
        return True

    def commit(self) -> None:
        if not self.in_flight:
            return
        result, verified = self.in_flight.popleft()
        self.verifying -= verified
        commit = self.scheduler.commit(result)
        assert commit.device_us == 17
        for seq, token in zip(commit.progressed, commit.tokens, strict=True):
            self.received[seq].append(token)
        got = list(zip(commit.progressed, commit.tokens, strict=True))
        assert not commit.logprobs or [(s, -int(found.sampled)) for s, found in commit.logprobs] == got
        for seq in commit.ended:
            self.finish(seq)

    def finish(self, seq: Sequence) -> None:
        assert seq.state is State.FINISHED and seq.slot == -1
        self.live.remove(seq)
        self.ended += 1
        received = self.received.pop(seq)
        assert received == self.scheduler.generated(seq)
        truth = self.worker.truth.pop(seq)
        tokens, reason, detail = truth.ending()
        if seq.finish_reason == "error":
            assert self.failures and seq.error is not None and seq.error.startswith("row")
            assert received == tokens[: len(received)]
        else:
            assert (received, seq.finish_reason, seq.stop_reason) == (tokens, reason, detail)

    def abort(self, seq: Sequence) -> None:
        self.scheduler.abort(seq)
        self.scheduler.abort(seq)
        assert seq.state is State.FINISHED and seq.finish_reason == "cancelled"
        received = self.received.pop(seq)
        assert received == self.scheduler.generated(seq)
        if seq in self.worker.truth:
            wanted = self.worker.truth.pop(seq).ending()[0]
            assert received == wanted[: len(received)]
        self.live.remove(seq)

    def drain(self) -> None:
        """Runs everything to its end, and finds every block and slot back."""
        for _ in range(100_000):
            if not self.scheduler.has_work and not self.in_flight:
                break
            while len(self.in_flight) < self.depth and self.plan():
                pass
            self.commit()
        assert not self.live and not self.received
        self.check()
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.scheduler.num_queued_requests == 0
        assert self.scheduler.num_free_blocks == self.scheduler.num_blocks

    def check(self) -> None:
        self.scheduler.check()
        s = self.scheduler
        assert s.num_running + s.num_waiting == len(self.live)
        assert s.num_running == sum(q.state is State.RUNNING for q in self.live)

    def run(self, data: bytes) -> None:
        """Interprets bytes as operations."""
        numbers = iter(data)
        for op in numbers:
            self.operations += 1
            kind = op % 16
            if kind < 3 and len(self.live) < 24:
                a, b, c = (next(numbers, 0) for _ in range(3))
                prompt = STORY[: a % 20] + [(b >> i) % VOCABULARY for i in range(1 + b % 5)]
                stops = tuple(i for i in (1, 2) if c >> 3 & i)
                try:
                    self.request(
                        prompt,
                        n=(1, 1, 1, 2, 3)[a % 5],
                        priority=(b >> 4) % 5 - 2,
                        salt=b"s" * (c & 1),
                        max_tokens=(1, 2, 5, 16, None)[c % 5],
                        min_tokens=(0, 0, 0, 1)[b % 4],
                        ignore_eos=bool(c & 32),
                        stop_token_ids=stops,
                    )
                except InvalidRequestError as e:
                    assert "KV memory" in str(e)
            elif kind < 8:
                if len(self.in_flight) < self.depth:
                    fail = self.failures and op > 240
                    self.plan(frozenset({op % 3} if fail else ()), details=bool(op & 64))
            elif kind < 14:
                self.commit()
            elif kind == 14 and self.live:
                self.abort(self.live[next(numbers, 0) % len(self.live)])
            elif op == 15:
                self.scheduler.reset_prefix_cache()
            self.check()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(max_size=500),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_blocks=st.integers(2, 40),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 40),
    depth=st.integers(1, 4),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    failures=st.booleans(),
    lookup=st.one_of(st.none(), st.sampled_from([(1, 1, 1), (3, 3, 2), (8, 4, 1), (64, 2, 2)])),
    waits=st.booleans(),
)
def test_random_histories(data, **config):
    simulation = Simulation(**config)
    simulation.run(data)
    simulation.drain()


SOAKS = [
    dict(block_size=1, num_blocks=60, max_num_seqs=6, budget=16, depth=3),
    dict(block_size=2, num_blocks=30, max_num_seqs=8, budget=24, depth=2, policy="priority"),
    dict(block_size=4, num_blocks=14, max_num_seqs=4, budget=7, depth=4, failures=True),
    dict(block_size=4, num_blocks=200, max_num_seqs=8, budget=64, depth=2),
    dict(block_size=4, num_blocks=16, max_num_seqs=8, budget=64, depth=2, caching=False),
    dict(block_size=16, num_blocks=5, max_num_seqs=5, budget=20, depth=1, policy="priority"),
    dict(block_size=1, num_blocks=62, max_num_seqs=6, budget=16, depth=3, lookup=(8, 3, 1), failures=True),
    dict(block_size=2, num_blocks=31, max_num_seqs=8, budget=64, depth=2, lookup=(4, 2, 1), waits=False),
    dict(
        block_size=4, num_blocks=15, max_num_seqs=8, budget=64, depth=4, lookup=(8, 4, 2), policy="priority"
    ),
]


@pytest.mark.parametrize("config", SOAKS, ids=lambda c: f"num_blocks={c['num_blocks']}")
def test_long_histories(config):
    """Together with the random ones above and the pool's: well over 10^5 operations."""
    simulation = Simulation(**config)
    generator = random.Random(config["num_blocks"])
    while simulation.operations < 14_000:
        simulation.run(generator.randbytes(4_000))
        simulation.drain()
    assert simulation.ended > 500
    if "lookup" in config:
        s = simulation.scheduler
        assert 300 < s.num_accepted_tokens < s.num_draft_tokens - 300
    if config["num_blocks"] < 40:
        assert simulation.scheduler.num_preemptions > 20
    if config.get("caching", True):
        assert simulation.scheduler.prefix_hit_tokens > 100


# -- single rules ----------------------------------------------------------------------------------------


def rows(simulation: Simulation) -> list[tuple[str, int, int, int]]:
    """The last plan's rows, by the name of the sequence; plans one step."""
    plan = simulation.scheduler.plan()
    if plan is None:
        return []
    _, made, *_ = simulation.worker.parse(plan.data)
    owner = {s.slot: s for s in simulation.table.running()}
    result = simulation.worker.execute(plan.data, plan.admitted, set(), False)
    simulation.in_flight.append((result, set()))
    return [(owner[r.slot].request_id, r.start, r.count, r.flags) for r in made]


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
