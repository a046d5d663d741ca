"""The scheduler: which sequences the next step computes, how far, and who waits.

There are no phases. Every step, the computed tokens of running sequences catch up with their known
ones under one token budget; what is left of the budget admits waiting sequences. The numbers of running
sequences live in `_fast.slots`; Python objects are touched when a sequence enters, ends or gives way.

Order. Each sequence has a rank, `arrival + ageing * priority` in seconds (with policy "fcfs", its
arrival), and smaller goes first. A point of priority is thus worth `ageing` seconds of waiting: the order
of two sequences never changes, nobody is overtaken by what arrives later than that, and nobody
starves. Admission, rows and blocks are given in this order, and the last running sequence gives way when
blocks run out: its blocks are freed and it is computed anew from its known tokens later.

Speculation. What the last tokens of a sequence were followed by when they last occurred in it is drafted,
and its next row verifies the drafts: it samples at every one of its positions, with the noise of the
position, and keeps what it drew up to the first draw that is not the draft in its place. That is rejection
sampling from a proposal that is sure of itself: such a draft x is to be accepted with probability p(x),
and else a token drawn from p without x; to draw from p and accept x if that is what was drawn does just
that. As noise belongs to positions, the tokens are the very ones that would have come without drafts.
How far such a row got is known with its result only, so that it cannot be planned ahead of it. Either the
whole batch waits for its results, if the drafts are expected to make up for the device's idling, or else
a sequence misses a step where its own drafts are worth more, or else nothing is drafted.
"""

import os
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence as List
from operator import attrgetter
from time import perf_counter
from typing import Literal, NamedTuple

import msgspec

from .._fast.slots import BlockPool, SlotTable
from ..errors import InvalidRequestError, QueueFullError
from ..outputs import FinishReason
from ..speculation import MAX_DRAFT_TOKENS, NgramSpeculation
from ..wire.plan import RESULT_HEADER, ResultDetails, RowLogprobs
from .sequence import Sequence, State
from .step_cost import StepCost

__all__ = ["Commit", "Plan", "Scheduler"]

_RANK = attrgetter("rank")
_INITS = msgspec.msgpack.Encoder()
_DETAILS = msgspec.msgpack.Decoder(ResultDetails)


class Plan(NamedTuple):
    """One step. `data` is laid out in `wire.plan`; `admitted` are the sequences that enter a slot."""

    step: int
    data: bytes
    admitted: list[Sequence]


class Commit(NamedTuple):
    """What a step's result changed. `tokens` has the new token of each of `progressed`, where a sequence
    stands once for every token it got, and so do `logprobs`.

    The `ended` ones have their `finish_reason`, and are in `progressed` too unless they failed.
    """

    progressed: list[Sequence]
    tokens: list[int]
    ended: list[Sequence]
    logprobs: list[tuple[Sequence, RowLogprobs]]
    device_us: int


class Scheduler:
    """Plans steps and commits their results, strictly in order. How many steps are in flight between
    the two is the caller's choice. Lives on one thread and does no input or output.

    num_blocks, block_size: the KV memory, in blocks of `block_size` token positions.
    max_num_batched_tokens: the most token positions a step computes.
    eos_ids: tokens that end a sequence unless its `ignore_eos` is set.
    ageing: seconds of waiting that make up for one point of priority; see the module's docstring.
    max_queued_requests, max_queued_tokens: bounds for what waits beyond the vacant slots; None: no bound.
    hash_key: 16 bytes that key the prefix hashes; fresh random ones if None.
    speculation: how tokens are drafted; None: they are not.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_ids: List[int] = (),
        enable_prefix_caching: bool = True,
        policy: Literal["fcfs", "priority"] = "fcfs",
        ageing: float = 10.0,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        hash_key: bytes | None = None,
        speculation: NgramSpeculation | None = None,
    ) -> None:
        self._pool = BlockPool(num_blocks, block_size, hash_key or os.urandom(16), enable_prefix_caching)
        # A fiftieth of the blocks is kept from newcomers while others run and need room to grow. Of a load
        # twice what the memory holds, that saves 18 % of the computed tokens and costs 1 % more steps.
        lookup = None
        if speculation is not None:
            s = speculation
            lookup = (s.num_speculative_tokens, s.prompt_lookup_max, s.prompt_lookup_min)
        self._table = SlotTable(self._pool, max_num_seqs, eos_ids, 0, num_blocks // 50, lookup)
        self._cost = None if speculation is None else StepCost()
        self._max_drafts = min(MAX_DRAFT_TOKENS, max_num_seqs * lookup[0]) if lookup else 0
        self._waited = False
        self._waited_steps = deque[int]()
        self._last_commit = 0.0
        self._budget = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos_ids = tuple(eos_ids)
        self._ageing = ageing if policy == "priority" else 0.0
        self._max_queued_requests = max_queued_requests
        self._max_queued_tokens = max_queued_tokens
        self._waiting: list[Sequence] = []  # by rank
        self._families: list[Sequence] = []  # running ones whose siblings wait to be forked from them
        self._serial = 0
        self._live = 0
        self._queued_tokens = 0
        self.num_queued_requests = 0
        """Requests none of whose sequences was ever admitted."""
        self.num_preemptions = 0

    # -- what is there -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self._live > 0

    @property
    def num_running(self) -> int:
        return self._table.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences added, not running and not finished."""
        return self._live - self._table.num_running

    @property
    def in_flight(self) -> int:
        """Steps planned and not committed."""
        return self._table.in_flight

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks no sequence holds; some still serve the prefix cache."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        return self._pool.num_cached

    @property
    def prefix_query_tokens(self) -> int:
        """Tokens looked up in the prefix cache at admissions."""
        return self._table.query_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """Those of them that were found."""
        return self._table.hit_tokens

    @property
    def num_drafts(self) -> int:
        """Rows that verified drafts."""
        return self._table.drafts

    @property
    def num_draft_tokens(self) -> int:
        return self._table.draft_tokens

    @property
    def num_accepted_tokens(self) -> int:
        """Those of them that became tokens of their sequence."""
        return self._table.accepted_tokens

    def generated(self, seq: Sequence, start: int = 0) -> list[int]:
        """The generated tokens of `seq` from the `start`-th, in whatever state it is."""
        start += seq.prompt_len
        if seq.slot < 0:
            return seq.tokens[start:].tolist()
        return self._table.tokens_from(seq.slot, start)

    def check(self) -> None:
        """Raises RuntimeError if the books contradict each other. For tests and debugging."""
        self._table.check()

    # -- in and out ----------------------------------------------------------------------------------

    def add(self, seqs: List[Sequence]) -> None:
        """Queues the `n` sequences of one request; all share the first one's prompt and limits.

        Raises `InvalidRequestError` if it can never run here, `QueueFullError` if too much waits.
        """
        first = seqs[0]
        max_len = self._limit(first)
        self._room(first.prompt_len)
        chain = self._pool.chain(first.tokens, first.cache_salt)
        for seq in seqs:
            seq.max_len, seq.chain = max_len, chain
            seq.rank = (seq.arrival + self._ageing * seq.priority, self._serial)
            seq.parent = None if seq is first else first
            self._serial += 1
        first.queued = True
        first.children = list(seqs[1:])
        insort(self._waiting, first, key=_RANK)
        self._live += len(seqs)
        self.num_queued_requests += 1
        self._queued_tokens += first.prompt_len

    def _limit(self, seq: Sequence) -> int:
        """The length at which the sequence ends, checked against the context and the memory."""
        length, max_tokens = seq.prompt_len, seq.params.max_tokens
        if not 1 <= length < self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {length} tokens; it must have 1 to {self._max_model_len - 1}, to leave room "
                f"for one more in a context of {self._max_model_len}",
                parameter="prompt",
                value=length,
            )
        limit = self._max_model_len if max_tokens is None else min(length + max_tokens, self._max_model_len)
        # The last token is never computed, so it needs no room.
        capacity = self._pool.num_blocks * self._pool.block_size + 1
        if length >= capacity:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, but the KV memory holds {capacity - 1}; shorten it, "
                "or give the engine more memory",
                parameter="prompt",
                value=length,
            )
        if limit > capacity and max_tokens is not None:
            raise InvalidRequestError(
                f"{length} prompt tokens and max_tokens={max_tokens} may need {limit - 1} positions, but the "
                f"KV memory holds {capacity - 1}; ask for at most {capacity - length} tokens, or give the "
                "engine more memory",
                parameter="max_tokens",
                value=max_tokens,
            )
        return min(limit, capacity)

    def _room(self, tokens: int) -> None:
        requests, bound = self.num_queued_requests, self._max_queued_requests
        if bound is not None and requests >= bound + self._table.num_vacant:
            raise QueueFullError(f"{requests} requests wait (max_queued_requests={bound}); try again later")
        bound = self._max_queued_tokens
        if bound is not None and requests and self._queued_tokens + tokens > bound:
            raise QueueFullError(
                f"{self._queued_tokens} prompt tokens wait and {tokens} more exceed "
                f"max_queued_tokens={bound}; try again later"
            )

    def abort(
        self, seq: Sequence, reason: FinishReason = "cancelled", stop_reason: str | int | None = None
    ) -> None:
        """Ends a sequence in whatever state it is; results on their way are dropped. Idempotent."""
        if seq.state is State.FINISHED:
            return
        if seq.state is State.RUNNING:
            self._leave_slot(seq)
        elif seq.parent is not None:
            seq.parent.children.remove(seq)
        else:
            del self._waiting[bisect_left(self._waiting, seq.rank, key=_RANK)]
        self._finish(seq, reason, stop_reason)

    def reset_prefix_cache(self) -> None:
        """Nothing computed before now is reused by sequences admitted from now on."""
        self._table.reset_prefix_cache()

    def _finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None) -> None:
        self._orphan(seq)
        self._dequeue(seq)
        seq.parent = None
        seq.state, seq.finish_reason, seq.stop_reason = State.FINISHED, reason, stop_reason
        self._live -= 1

    def _dequeue(self, seq: Sequence) -> None:
        if seq.queued:
            seq.queued = False
            self.num_queued_requests -= 1
            self._queued_tokens -= seq.prompt_len

    def _orphan(self, seq: Sequence) -> None:
        """With its parent gone, a sibling waits for itself."""
        for child in seq.children:
            child.parent = None
            insort(self._waiting, child, key=_RANK)
        seq.children = []
        if seq in self._families:
            self._families.remove(seq)

    def _leave_slot(self, seq: Sequence) -> None:
        seq.tokens = array("i", self._table.token_bytes(seq.slot))
        self._table.release(seq.slot)
        seq.slot = -1

    # -- a step --------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None if nothing can be computed before a result comes or a request is added."""
        table = self._table
        times = None
        if self._cost is not None and table.look_up():
            times = self._cost.times(table.num_running, self._max_drafts)
            expected, time, pending = table.weigh(times)
            if pending and self._cost.worth_waiting(expected / table.num_running, time, times[0]):
                self._waited = True
                return None
        # Only what earlier plans compute can be copied by this one.
        ready = [seq for seq in self._families if table.computed(seq.slot) >= seq.prompt_len]
        table.begin(self._budget, times)
        preempted = False
        while not table.plan_running():
            self._preempt(table.last())
            preempted = True
        # Who would enter now would take the blocks that were just taken from others.
        admitted = [] if preempted else self._admit(ready)
        inits = [seq.slot_init(seq.slot, self._eos_ids) for seq in admitted]
        data = table.finish(_INITS.encode(inits) if inits else b"")
        if data is None:
            return None
        if self._waited and table.in_flight == 1:
            self._waited_steps.append(table.step)
        self._waited = False
        return Plan(table.step, data, admitted)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        self._leave_slot(seq)
        self._orphan(seq)
        seq.chain = self._pool.chain(seq.tokens, seq.cache_salt)
        seq.state = State.WAITING
        insort(self._waiting, seq, key=_RANK)

    def _admit(self, ready: list[Sequence]) -> list[Sequence]:
        """Seats siblings of `ready` sequences, then waiting ones, in order and until something lacks.

        The known tokens of all that enter in one plan are bounded, and so is the size of the plan.
        """
        table, admitted = self._table, list[Sequence]()
        room = max(self._max_model_len, self._budget)
        for parent in ready:
            while parent.children and table.budget and table.num_vacant:
                seq = parent.children[0]
                room -= len(seq.tokens)
                if room < 0:
                    return admitted
                slot = table.fork(parent.slot, seq, seq.prompt_len, seq.chain, seq.rank)
                if slot < 0:
                    return admitted
                del parent.children[0]
                seq.parent = None
                self._enter(seq, slot, parent.num_cached_tokens)
                admitted.append(seq)
            if not parent.children:
                self._families.remove(parent)
        while self._waiting and table.budget and table.num_vacant:
            seq = self._waiting[0]
            room -= len(seq.tokens)
            if room < 0:
                break
            seat = table.admit(
                seq,
                seq.tokens,
                seq.chain,
                max_len=seq.max_len,
                min_len=seq.min_len,
                stop_ids=seq.stop_ids,
                ignore_eos=seq.params.ignore_eos,
                rank=seq.rank,
                drafting=not seq.penalized,
            )
            if seat is None:
                break
            del self._waiting[0]
            self._enter(seq, *seat)
            if seq.children:
                self._families.append(seq)
            admitted.append(seq)
        return admitted

    def _enter(self, seq: Sequence, slot: int, num_cached_tokens: int) -> None:
        self._dequeue(seq)
        seq.state, seq.slot = State.RUNNING, slot
        if not seq.started:
            seq.started, seq.num_cached_tokens = True, num_cached_tokens

    def commit(self, result: bytes | memoryview) -> Commit:
        """Takes the result of the oldest step in flight. Raises RuntimeError if it answers another."""
        progressed, tokens, endings, sampled = self._table.commit(result)
        if self._cost is not None:
            self._learn(self._cost, result)
        logprobs: list[tuple[Sequence, RowLogprobs]] = []
        failures: dict[int, str] = {}
        if sampled is not None:
            details = _DETAILS.decode(memoryview(result)[4 * (RESULT_HEADER + len(sampled)) :])
            failures = details.failures
            for sample, found in details.logprobs.items():
                seq = sampled[sample]
                if seq is not None:
                    logprobs.append((seq, found))
        ended: list[Sequence] = []
        for seq, reason, detail in endings:
            self._leave_slot(seq)
            if reason == "error":
                seq.error = failures.get(detail, "the worker gave no cause")
                detail = None
            self._finish(seq, reason, detail)
            ended.append(seq)
        return Commit(progressed, tokens, ended, logprobs, _device_us(result))

    def _learn(self, cost: StepCost, result: bytes | memoryview) -> None:
        now, spent = perf_counter(), _device_us(result)
        step = int.from_bytes(result[4:8], "little")
        if self._table.sampled_only:
            cost.observe(self._table.sampled_only, spent)
        if self._waited_steps and self._waited_steps[0] == step:
            self._waited_steps.popleft()
            cost.observe_gap(1e6 * (now - self._last_commit) - spent)
        self._last_commit = now


def _device_us(result: bytes | memoryview) -> int:
    return int.from_bytes(result[16:20], "little")
