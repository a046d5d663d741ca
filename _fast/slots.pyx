# The batch on the host: block pool, per-sequence numbers by slot, plan writing and commit.

from array import array as Array
from collections import deque

cimport cython
from cpython cimport array
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset

include "slots/arrays.pxi"
include "slots/lines.pxi"
include "slots/siphash.pxi"
include "slots/blocks.pxi"
include "slots/plan.pxi"
include "slots/ngram.pxi"
include "slots/slot.pxi"
include "slots/draft.pxi"


@cython.final
cdef class SlotTable:
    """The running sequences. Owns the slots, writes plans, commits results.

    The order of the batch is by (rank, serial), smallest first. Rows are planned and blocks are given
    in this order, so what must give way, `last()`, never has a row in the step that is being planned.
    """

    cdef readonly BlockPool pool
    cdef readonly int num_slots, num_running, budget, watermark
    cdef readonly int64_t step
    cdef public int epoch
    cdef readonly int64_t hit_tokens, query_tokens
    cdef readonly int64_t drafts, draft_tokens, accepted_tokens
    cdef readonly int sampled_only
    """Tokens of the step committed last if every one of them was sampled from, else 0."""
    cdef Lookup lookup
    cdef int num_draft, room, drafted
    cdef double expected
    cdef const double[::1] times
    cdef Slot* slots
    cdef int32_t* order
    cdef int32_t* vacant
    cdef list owners
    cdef object records
    cdef int32_t* eos
    cdef int num_eos, cursor
    cdef bint chunks
    cdef PlanBuffer plan

    def __cinit__(
        self, BlockPool pool, int num_slots, eos_ids=(), int epoch=0, int watermark=0, tuple lookup=None
    ):
        """`lookup`: the most tokens drafted in a row, the longest n-gram looked for and the shortest."""
        cdef int i
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}")
        if lookup is not None:
            self.num_draft, self.lookup.most, self.lookup.least = lookup
            if self.num_draft < 1 or not 1 <= self.lookup.least <= self.lookup.most <= MAX_NGRAM:
                raise ValueError(f"lookup={lookup} must be >= 1, n-grams of 1 to {MAX_NGRAM}")
            self.lookup.key = pool.key.lo | 1
        self.pool, self.num_slots, self.epoch, self.watermark = pool, num_slots, epoch, watermark
        self.slots = <Slot*>_alloc(num_slots * sizeof(Slot))
        self.order = <int32_t*>_alloc(num_slots * sizeof(int32_t))
        self.vacant = <int32_t*>_alloc(num_slots * sizeof(int32_t))
        for i in range(num_slots):
            self.vacant[i] = num_slots - 1 - i
        self.owners = [None] * num_slots
        self.records = deque()
        self.plan = PlanBuffer()
        self.num_eos = len(eos_ids)
        self.eos = <int32_t*>_alloc(self.num_eos * sizeof(int32_t))
        for i in range(self.num_eos):
            self.eos[i] = eos_ids[i]

    def __dealloc__(self):
        cdef int i
        if self.slots is not NULL:
            for i in range(self.num_slots):
                _clear(&self.slots[i])
        free(self.slots); free(self.order); free(self.vacant); free(self.eos)

    # -- residents -----------------------------------------------------------------------------------

    @property
    def num_vacant(self) -> int:
        return self.num_slots - self.num_running

    @property
    def in_flight(self) -> int:
        """Steps planned whose results have not been committed."""
        return len(self.records)

    cdef Slot* _slot(self, int slot) except NULL:
        if not 0 <= slot < self.num_slots or not self.slots[slot].used:
            raise ValueError(f"slot {slot} is empty")
        return &self.slots[slot]

    cdef int _enter(self, object owner, double rank, int64_t serial) except -1:
        """Takes a vacant slot and gives it a place in the order."""
        cdef int slot, i
        cdef Slot* s
        slot = self.vacant[self.num_slots - self.num_running - 1]
        i = self.num_running
        while i:
            s = &self.slots[self.order[i - 1]]
            if s.rank < rank or (s.rank == rank and s.serial < serial):
                break
            self.order[i] = self.order[i - 1]
            i -= 1
        self.order[i] = slot
        self.num_running += 1
        self.owners[slot] = owner
        s = &self.slots[slot]
        s.used, s.rank, s.serial, s.relay = True, rank, serial, -1
        s.source, s.rate = -1, FIRST_RATE
        return slot

    def admit(
        self, owner, const int32_t[::1] tokens, bytes chain, *, int max_len, int min_len,
        const int32_t[::1] stop_ids, bint ignore_eos, tuple rank, bint drafting=False,
    ) -> tuple | None:
        """Seats a sequence in the step being planned, and plans its first row.

        `rank` is its place in the order, (rank, serial); tokens are drafted for it if `drafting`. All blocks
        of its tokens are taken now, cached ones first, so that a long prompt is never stuck half way. Returns
        (slot, tokens found in the cache), or None if the blocks do not suffice.
        """
        cdef BlockPool pool = self.pool
        cdef int n = tokens.shape[0], total, matched = 0, revived = 0, block, slot, i, limit
        cdef Hash h
        cdef Buffer blocks
        cdef Slot* s
        if not 1 <= n < max_len or self.budget < 1 or self.num_running == self.num_slots:
            raise ValueError(
                f"cannot admit {n} tokens of at most {max_len} with a budget of {self.budget} and "
                f"{self.num_slots - self.num_running} vacant slots"
            )
        total = (n + pool.block_size - 1) // pool.block_size
        if total - pool._matchable(chain, n) > pool.num_free:
            return None
        memset(&blocks, 0, sizeof(Buffer))
        _push(&blocks, total)
        limit = pool._matchable(chain, n)
        while matched < limit:
            memcpy(&h, <char*>chain + 16 * (matched + 1), 16)
            block = pool._find(h)
            if block < 0:
                break
            revived += pool.refs_[block] == 0
            blocks.at[matched] = block
            matched += 1
        if total - matched + revived + (self.watermark if self.num_running else 0) > pool.num_free:
            _drop(&blocks)
            return None
        slot = self._enter(owner, rank[0], rank[1])
        s = &self.slots[slot]
        s.blocks = blocks
        for i in range(matched):
            pool._retain(blocks.at[i])
        for i in range(matched, total):
            blocks.at[i] = pool._allocate()
        for i in range(total):
            self.plan.update(slot, i, blocks.at[i])
        memcpy(_push(&s.tokens, n), &tokens[0], n * sizeof(int32_t))
        s.known, s.max_len, s.min_len, s.ignore_eos = n, max_len, min_len, ignore_eos
        s.drafting = drafting and self.num_draft > 0
        s.computed = s.committed = matched * pool.block_size
        _set_stops(s, &stop_ids[0] if stop_ids.shape[0] else NULL, <int>stop_ids.shape[0])
        s.published, s.publishes = matched, len(chain) > 0
        if s.publishes:
            memcpy(&s.hash, <char*>chain + 16 * matched, 16)
            self.query_tokens += n
            self.hit_tokens += s.computed
        self._row(slot, s, min(n - s.computed, self.budget))
        return slot, matched * pool.block_size

    def fork(self, int parent, owner, int prompt_len, bytes chain, tuple rank) -> int:
        """Seats a sibling on the prompt of `parent`, all of which earlier steps compute.

        It shares the full blocks before the prompt's last token, copies the block that token shares
        with others, and plans that token, to draw its own continuation. Returns the slot, -1 if no
        block is free.
        """
        cdef BlockPool pool = self.pool
        cdef Slot* p = self._slot(parent)
        cdef Slot* s
        cdef int slot, i, block, last = prompt_len - 1, shared = last // pool.block_size
        if p.computed < prompt_len or self.budget < 1 or self.num_running == self.num_slots:
            raise ValueError(
                f"cannot fork slot {parent}, {p.computed} of {prompt_len} tokens planned, with a budget of "
                f"{self.budget} and {self.num_slots - self.num_running} vacant slots"
            )
        if pool.num_free == 0:
            return -1
        slot = self._enter(owner, rank[0], rank[1])
        s = &self.slots[slot]
        memcpy(_push(&s.blocks, shared + 1), p.blocks.at, shared * sizeof(int32_t))
        for i in range(shared):
            pool._retain(s.blocks.at[i])
        s.blocks.at[shared] = block = pool._allocate()
        for i in range(shared + 1):
            self.plan.update(slot, i, s.blocks.at[i])
        if last % pool.block_size:
            self.plan.copy(p.blocks.at[shared], block)
        memcpy(_push(&s.tokens, prompt_len), p.tokens.at, prompt_len * sizeof(int32_t))
        s.known, s.max_len, s.min_len, s.ignore_eos = prompt_len, p.max_len, p.min_len, p.ignore_eos
        s.drafting = p.drafting
        # Results come in the order of plans: what the parent has in flight is there before this row is.
        s.computed = s.committed = last
        _set_stops(s, p.stops, p.num_stops)
        s.published, s.publishes = shared, p.publishes
        if s.publishes:
            memcpy(&s.hash, <char*>chain + 16 * shared, 16)
        self._row(slot, s, 1)
        return slot

    def release(self, int slot) -> None:
        """Empties a slot; its blocks may be reused at once, though planned steps may still write there:
        plans are executed in order, and such writes fall on unpublished positions only."""
        cdef Slot* s = self._slot(slot)
        cdef Py_ssize_t i = s.blocks.size
        cdef int place = 0
        while i:  # the tail first: a prefix is worth more than what follows it
            i -= 1
            self.pool._free(s.blocks.at[i])
        while self.order[place] != slot:
            place += 1
        self.num_running -= 1
        memmove(&self.order[place], &self.order[place + 1], (self.num_running - place) * sizeof(int32_t))
        self.vacant[self.num_slots - self.num_running - 1] = slot
        self.owners[slot] = None
        _clear(s)

    def last(self) -> object:
        """The owner that is the last in the order."""
        if not self.num_running:
            raise ValueError("nothing runs")
        return self.owners[self.order[self.num_running - 1]]

    def running(self) -> list:
        """The owners in order."""
        return [self.owners[self.order[i]] for i in range(self.num_running)]

    def known_len(self, int slot) -> int:
        return self._slot(slot).known

    def computed(self, int slot) -> int:
        """Positions planned to be computed, by plans made so far."""
        return self._slot(slot).computed

    def tokens_from(self, int slot, int start=0) -> list:
        """The known tokens from position `start`."""
        cdef Slot* s = self._slot(slot)
        return [s.tokens.at[i] for i in range(max(start, 0), s.known)]

    def token_bytes(self, int slot) -> bytes:
        """All known tokens as int32."""
        cdef Slot* s = self._slot(slot)
        return (<char*>s.tokens.at)[: s.known * sizeof(int32_t)]

    def blocks(self, int slot) -> list:
        cdef Slot* s = self._slot(slot)
        return [s.blocks.at[i] for i in range(s.blocks.size)]

    # -- a plan --------------------------------------------------------------------------------------

    def look_up(self) -> int:
        """Predicts what comes next in running sequences that are drafted for; the number of predictions."""
        cdef int i, room = INDEXED_PER_STEP, count = 0
        cdef Slot* s
        for i in range(self.num_running):
            s = &self.slots[self.order[i]]
            s.waits = False
            if s.drafting and _decodes(s):
                if s.source < 0 and s.drafts == 0:
                    s.source = _index(&s.ngrams, &self.lookup, s.tokens.at, s.known, &room)
                count += s.source >= 0
        return count

    def weigh(self, const double[::1] times) -> tuple[float, float, bool]:
        """What the next step can be expected to give if all results in flight are there before it is planned:
        tokens, time as in `begin`, and whether it needs results that are in flight."""
        cdef int i, drafted
        cdef double alone, time
        cdef bint pending = False
        cdef Slot* s
        self._price(times, <int>times.shape[0] - 1)
        for i in range(self.num_running):
            s = &self.slots[self.order[i]]
            if _decodes(s) and s.source >= 0:
                alone, drafted = self.expected, self.drafted
                self._worth(s, min(self.num_draft, self.room))
                if s.inflight and self.drafted > drafted:
                    pending = True
                    # A row that waits alone misses a step: its drafts must make up for that one's token.
                    time = times[self.drafted] - times[drafted]
                    s.waits = self.expected - alone - time * alone / times[drafted] > 1
        return self.expected, times[self.drafted], pending

    def begin(self, int budget, const double[::1] times=None) -> None:
        """Starts a step of at most `budget` computed tokens.

        `times[i]` is what it takes with i draft tokens, in any unit; without it nothing is drafted.
        """
        self.budget, self.cursor, self.chunks = budget, 0, False
        self.plan.clear()
        # Every running sequence has room for its one token, whatever is drafted for the others.
        self._price(times, 0 if times is None else min(<int>times.shape[0] - 1, budget - self.num_running))

    cdef int _price(self, const double[::1] times, int room) except -1:
        self.times, self.room, self.expected, self.drafted = times, max(room, 0), self.num_running, 0
        return 0

    def plan_running(self) -> bool:
        """Plans rows for the running sequences: those short of one token first, so that a long prompt
        does not hold up the others, then chunks. False if a block is missing: release the owner of
        `last()` and call again."""
        cdef int slot, i, missing
        cdef Slot* s
        while self.cursor < self.num_running and self.budget:
            slot = self.order[self.cursor]
            s = &self.slots[slot]
            missing = s.known + s.inflight - s.computed
            if s.drafts or s.waits:
                pass
            elif missing == 1 and s.computed + 1 < s.max_len:
                if s.computed == s.blocks.size * self.pool.block_size:
                    i = self.pool._allocate()
                    if i < 0:
                        return False
                    _push(&s.blocks, 1)[0] = i
                    self.plan.update(slot, <int>s.blocks.size - 1, i)
                if s.source >= 0 and s.inflight == 0 and self.room:
                    self._draft_row(slot, s)
                self._row(slot, s, 1)
            elif missing > 1:
                self.chunks = True
            self.cursor += 1
        if self.chunks:
            for i in range(self.num_running):
                s = &self.slots[self.order[i]]
                missing = s.known + s.inflight - s.computed
                if missing > 1 and self.budget and not s.drafts:
                    self._row(self.order[i], s, min(missing, self.budget))
        return True

    cdef int _worth(self, Slot* s, int most) except -1:
        """How many tokens to draft, at most `most`: as long as one more raises the tokens that are expected
        of the step by a larger share than its time. Takes them into account."""
        cdef int count = 0
        cdef double chance = 1.0, more
        while count < most:
            chance *= s.rate
            more = self.times[self.drafted + 1] - self.times[self.drafted]
            if chance < MIN_CHANCE or chance * self.times[self.drafted] <= more * self.expected:
                break
            self.expected += chance
            self.drafted += 1
            count += 1
        self.room -= count
        return count

    cdef int _draft_row(self, int slot, Slot* s) except -1:
        """Drafts what shall follow the known tokens, if that is worth it."""
        cdef BlockPool pool = self.pool
        cdef int size = pool.block_size, count = 0, free = pool.num_free - self.num_running
        # Blocks that the others may need in this step are left alone.
        cdef int64_t most = s.blocks.size * size - s.known + max(free, 0) * size
        count = self._worth(s, <int>min(most, self.num_draft, self.room, s.max_len - s.known - 1))
        while s.known + count > s.blocks.size * size:
            self.plan.update(slot, <int>s.blocks.size, pool._allocate())
            _push(&s.blocks, 1)[0] = self.plan.updates.at[self.plan.updates.size - 1]
        return _draft(s, count)

    cdef inline int _row(self, int slot, Slot* s, int count) except -1:
        cdef int start = s.computed, end = start + count, flags = RELAY if start == s.relay else 0
        if s.drafts:
            count += s.drafts
            end += s.drafts
            flags = SAMPLE | VERIFY
            s.inflight = count
            s.relay = -1
        elif end == s.known + s.inflight:
            flags |= SAMPLE
            s.inflight += 1
            s.relay = end
        s.computed = end
        self.budget -= count
        return self.plan.row(slot, start, count, flags, s.tokens.at + start)

    def finish(self, bytes payload=b"") -> bytes | None:
        """Ends the step: the plan as `wire.plan` draws it, or None if it has no row."""
        cdef Py_ssize_t rows = self.plan.rows(), i
        cdef bytes plan, record
        cdef int32_t* row
        cdef Row* memo
        cdef int sampled = 0, tokens = 0
        if rows == 0:
            return None
        self.step = (self.step + 1) & 0x7FFFFFFF  # it travels as an int32
        plan = self.plan.join(self.epoch, <int>self.step, payload)
        row = <int32_t*><char*>plan + HEADER
        record = PyBytes_FromStringAndSize(NULL, rows * sizeof(Row))
        memo = <Row*><char*>record
        for i in range(rows):
            memo[i].slot, memo[i].epoch = row[0], self.slots[row[0]].epoch
            memo[i].end = row[1] + row[2]
            memo[i].sampled = row[2] if row[3] & VERIFY else row[3] & SAMPLE
            sampled += memo[i].sampled
            tokens += row[2]
            row += ROW
        self.records.append((self.step, sampled, record, tokens))
        return plan

    # -- a result ------------------------------------------------------------------------------------

    def commit(self, const uint8_t[::1] result) -> tuple:
        """Takes the result of the oldest step in flight: lengths grow, endings are found, full blocks
        are published. Rows of sequences that left their slot meanwhile are dropped.

        Returns (progressed, tokens, ended, sampled): owners that got a token, those tokens, endings
        as (owner, reason, detail), and the owner (None if dropped) of every sample, or None if the
        result has no payload. A verified row gives its owner as many times as it got a token. Ended slots
        are still to be released. Reason and detail: "stop" with the stop token's id, None for an
        end-of-sequence token; "length" with None; "error" with the number of the failed sample.
        """
        return _commit(self, result)

    def reset_prefix_cache(self) -> None:
        """Nothing computed before now is found again, also what running sequences have yet to publish."""
        cdef int i
        self.pool.reset()
        for i in range(self.num_running):
            self.slots[self.order[i]].publishes = False

    # -- for tests and debugging ---------------------------------------------------------------------

    def check(self) -> None:
        """Raises RuntimeError if slots, blocks and steps in flight contradict each other."""
        _check_books(self)


include "slots/commit.pxi"
include "slots/check.pxi"
