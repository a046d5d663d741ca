"""An engine without an event loop, over a plain-Python worker that checks every key and value it attends to.

The language model is a pure function of the tokens before, so each sequence must give exactly what it
gives when it is run alone, whatever batching, chunking, caching, forking and preemption did meanwhile.
"""

from collections import deque

from asyncengine.errors import InvalidRequestError
from asyncengine.params import SamplingParams
from asyncengine.scheduling.scheduler import Scheduler
from asyncengine.scheduling.sequence import Sequence, State
from asyncengine.speculation import NgramSpeculation
from asyncengine.wire.plan import VERIFY

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
