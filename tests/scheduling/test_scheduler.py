"""The scheduler against a plain-Python worker that checks every key and value it attends to.

The language model is a pure function of the tokens before, so each sequence must give exactly what it
gives when it is run alone, whatever batching, chunking, caching, forking and preemption did meanwhile.
"""

import random
from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine.errors import InvalidRequestError, QueueFullError
from asyncengine.params import SamplingParams
from asyncengine.scheduling.scheduler import Scheduler
from asyncengine.scheduling.sequence import Sequence, State, noise_key
from asyncengine.wire.plan import RELAY, SAMPLE

from .model import EOS, VOCABULARY, Worker

STORY = [hash(("story", i)) % VOCABULARY for i in range(64)]
PRIVATE = ("_table", "_pool")  # what the checks below look into


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
        )
        self.table, self.pool = (getattr(self.scheduler, name, None) for name in PRIVATE)
        self.worker = Worker(num_blocks, block_size)
        self.block_size, self.budget, self.depth, self.failures = block_size, budget, depth, failures
        self.in_flight: deque[bytes] = deque()
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
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "work is left and nothing moves"
            return False
        header, rows, *_, inits = self.worker.parse(plan.data)
        assert header[1] == plan.step
        running = self.table.running()
        assert [s.rank for s in running] == sorted(s.rank for s in running)
        assert sum(r.count for r in rows) <= self.budget
        assert len(inits) == sum(id(s) not in before for s in running)
        for row in rows:
            blocks = self.table.blocks(row.slot)
            for i in range(row.start // self.block_size, (row.start + row.count - 1) // self.block_size + 1):
                assert self.pool.refs(blocks[i]) == 1, "a shared block is written"
                assert not self.pool.is_cached(blocks[i]), "a published block is written"
        # Plans are executed in order, so it makes no difference that this one is executed already.
        self.in_flight.append(self.worker.execute(plan.data, plan.admitted, failing, details))
        return True

    def commit(self) -> None:
        if not self.in_flight:
            return
        commit = self.scheduler.commit(self.in_flight.popleft())
        assert commit.device_us == 17
        for seq, token in zip(commit.progressed, commit.tokens, strict=True):
            self.received[seq].append(token)
        for seq, logprobs in commit.logprobs:
            assert logprobs.sampled == -float(commit.tokens[commit.progressed.index(seq)])
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
                    assert "KV memory" in str(e)  # noqa: PT017
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
]


@pytest.mark.parametrize("config", SOAKS, ids=lambda c: f"block_size={c['block_size']}")
def test_long_histories(config):
    """Together with the random ones above and the pool's: well over 10^5 operations."""
    simulation = Simulation(**config)
    generator = random.Random(config["num_blocks"])
    while simulation.operations < 14_000:
        simulation.run(generator.randbytes(4_000))
        simulation.drain()
    assert simulation.ended > 500
    if config["num_blocks"] < 40:
        assert simulation.scheduler.num_preemptions > 20
    if config.get("caching", True):
        assert simulation.scheduler.prefix_hit_tokens > 100
