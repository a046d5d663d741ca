# A plan's rows, made into the arrays that a step reads.

cdef enum:
    PLAN_HEADER = 8  # int32 fields, as `wire.plan` draws them
    RESULT_HEADER = 8
    ROW_FIELDS = 4
    SAMPLE = 1
    RELAY = 2
    VERIFY = 4


# The first of an array of at least `size` elements.
cdef int32_t *_start(int32_t[::1] array, int64_t size, str name) except? NULL:
    if size < 1:
        raise ValueError("a batch has at least one slot, token, sample and block")
    _enough(array.shape[0], size, name)
    return &array[0]


@cython.final
cdef class StepInputs:
    """The arrays of a batch that plans are written into: int32, held, not copied.

    `block_table` is [slots, width], `last_token` [slots], `token_ids`, `positions` and `token_row` [tokens],
    `query_start` [slots + 1], `context_len` and `row_slot` [slots], the three of samples [samples]: together
    with `max_len`, the most positions of a sequence, and `num_blocks` they bound what a plan may ask for.
    """

    cdef int32_t *_block_table
    cdef int32_t *_last_token
    cdef int32_t *_token_ids
    cdef int32_t *_positions
    cdef int32_t *_token_row
    cdef int32_t *_query_start
    cdef int32_t *_context_len
    cdef int32_t *_row_slot
    cdef int32_t *_sample_rows
    cdef int32_t *_sample_slots
    cdef int32_t *_sample_positions
    cdef int64_t _slots, _max_tokens, _max_len, _max_samples, _width, _num_blocks
    cdef tuple _held
    cdef readonly int epoch, step
    """Of the last plan."""
    cdef readonly int num_rows, num_tokens, num_samples
    """What it fills of the arrays."""
    cdef readonly int num_copies
    cdef readonly Py_ssize_t copies_at, payload_at
    """Where in its bytes its block copies and its payload begin."""

    def __cinit__(
        self,
        *,
        int32_t[:, ::1] block_table not None,
        int32_t[::1] last_token not None,
        int32_t[::1] token_ids not None,
        int32_t[::1] positions not None,
        int32_t[::1] token_row not None,
        int32_t[::1] query_start not None,
        int32_t[::1] context_len not None,
        int32_t[::1] row_slot not None,
        int32_t[::1] sample_rows not None,
        int32_t[::1] sample_slots not None,
        int32_t[::1] sample_positions not None,
        int32_t max_len,
        int32_t num_blocks,
    ):
        self._slots, self._width = block_table.shape[0], block_table.shape[1]
        self._max_tokens, self._max_samples = token_ids.shape[0], sample_rows.shape[0]
        self._max_len, self._num_blocks = max_len, num_blocks
        if self._slots < 1 or self._width < 1:
            raise ValueError("a batch has at least one slot, token, sample and block")
        self._block_table = &block_table[0, 0]
        self._last_token = _start(last_token, self._slots, "last_token")
        self._token_ids = _start(token_ids, self._max_tokens, "token_ids")
        self._positions = _start(positions, self._max_tokens, "positions")
        self._token_row = _start(token_row, self._max_tokens, "token_row")
        self._query_start = _start(query_start, self._slots + 1, "query_start")
        self._context_len = _start(context_len, self._slots, "context_len")
        self._row_slot = _start(row_slot, self._slots, "row_slot")
        self._sample_rows = _start(sample_rows, self._max_samples, "sample_rows")
        self._sample_slots = _start(sample_slots, self._max_samples, "sample_slots")
        self._sample_positions = _start(sample_positions, self._max_samples, "sample_positions")
        self._held = (
            block_table, last_token, token_ids, positions, token_row, query_start, context_len, row_slot,
            sample_rows, sample_slots, sample_positions,
        )

    def fill(self, bytes plan not None):
        """Writes `plan` into the arrays. ValueError, and nothing is written, if it is not one whole plan or
        asks for what is out of bounds: a defect of the host, which must not become a write to foreign
        memory."""
        cdef const int32_t *header = <const int32_t *><const char *>plan
        cdef const int32_t *rows
        cdef const int32_t *updates
        cdef const int32_t *tokens
        cdef int64_t size = len(plan), relayed = 0, samples = 0, total = 0, end, i
        if size < PLAN_HEADER * 4:
            raise ValueError(f"a plan of {size} bytes has no header")
        cdef int64_t num_rows = header[2], num_tokens = header[3], num_updates = header[4]
        cdef int64_t num_copies = header[5], payload = header[6]
        end = PLAN_HEADER + ROW_FIELDS * num_rows + 3 * num_updates + 2 * num_copies + num_tokens
        if min(num_rows, num_tokens, num_updates, num_copies, payload) < 0 or size != 4 * end + payload:
            raise ValueError(f"plan {header[1]} has {size} bytes, its header tells {4 * end + payload}")
        rows = header + PLAN_HEADER
        updates = rows + ROW_FIELDS * num_rows
        tokens = updates + 3 * num_updates + 2 * num_copies
        cdef bint sound = num_rows <= self._slots
        for i in range(num_rows):
            sound &= self._is_sound(rows + ROW_FIELDS * i, i == relayed)
            relayed += (rows[ROW_FIELDS * i + 3] & RELAY) != 0
            samples += _samples(rows + ROW_FIELDS * i)
            total += rows[ROW_FIELDS * i + 2]
        sound &= total == relayed + num_tokens and total <= self._max_tokens and samples <= self._max_samples
        for i in range(num_updates):
            sound &= 0 <= updates[3 * i] < self._slots
            sound &= 0 <= updates[3 * i + 1] < self._width
            sound &= 0 <= updates[3 * i + 2] < self._num_blocks
        for i in range(2 * num_copies):
            sound &= 0 <= updates[3 * num_updates + i] < self._num_blocks
        if not sound:
            raise ValueError(
                f"plan {header[1]} is out of bounds: it has {num_rows} rows, {total} tokens and {samples}"
                f" samples; there are {self._slots} slots, {self._max_tokens} tokens and {self._max_samples}"
                f" samples a step, {self._max_len} positions and {self._num_blocks} blocks"
            )
        for i in range(num_updates):
            self._block_table[updates[3 * i] * self._width + updates[3 * i + 1]] = updates[3 * i + 2]
        self._fill_rows(rows, num_rows)
        for i in range(relayed):
            self._token_ids[i] = self._last_token[rows[ROW_FIELDS * i]]
        memcpy(self._token_ids + relayed, tokens, num_tokens * sizeof(int32_t))
        self.epoch, self.step = header[0], header[1]
        self.num_rows, self.num_tokens, self.num_samples = num_rows, total, samples
        self.num_copies = num_copies
        self.copies_at = 4 * (PLAN_HEADER + ROW_FIELDS * num_rows + 3 * num_updates)
        self.payload_at = 4 * end

    def keep(self, const int32_t[::1] tokens not None):
        """`tokens` [samples] were drawn: what slots relay from now on. Of a row with several, any."""
        _enough(tokens.shape[0], self.num_samples, "tokens")
        for i in range(self.num_samples):
            self._last_token[self._sample_slots[i]] = tokens[i]

    def result(self, const int32_t[::1] tokens not None, bytes payload not None, int32_t spent_us):
        """The result (`wire.plan`) of the last plan: what its samples drew, and the device's time for it."""
        cdef bytes result
        cdef int32_t *out
        _enough(tokens.shape[0], self.num_samples, "tokens")
        result = PyBytes_FromStringAndSize(NULL, 4 * (RESULT_HEADER + self.num_samples) + len(payload))
        out = <int32_t *><char *>result
        memset(out, 0, 4 * RESULT_HEADER)
        out[0], out[1], out[2], out[3] = self.epoch, self.step, self.num_samples, <int32_t>len(payload)
        out[4] = spent_us
        if self.num_samples:
            memcpy(out + RESULT_HEADER, &tokens[0], self.num_samples * sizeof(int32_t))
        memcpy(out + RESULT_HEADER + self.num_samples, <const char *>payload, len(payload))
        return result

    # Whether a row is within the bounds; rows that relay have one token and come `first`.
    cdef bint _is_sound(self, const int32_t *row, bint first) noexcept:
        cdef int64_t slot = row[0], start = row[1], count = row[2], flags = row[3]
        return (
            0 <= slot < self._slots
            and 0 <= start
            and 0 < count
            and start + count <= self._max_len
            and 0 <= flags <= SAMPLE + RELAY + VERIFY
            and (not flags & RELAY or (first and count == 1))
        )

    cdef void _fill_rows(self, const int32_t *rows, int64_t num_rows) noexcept:
        cdef const int32_t *row
        cdef int64_t at = 0, sample = 0, r, i
        for r in range(num_rows):
            row = rows + ROW_FIELDS * r
            self._row_slot[r] = row[0]
            self._context_len[r] = row[1] + row[2]
            self._query_start[r] = at
            for i in range(row[2]):
                self._token_row[at + i] = r
                self._positions[at + i] = row[1] + i
            at += row[2]
            # A row's samples are its last positions, so many of them as it has samples.
            for i in range(at - _samples(row), at):
                self._sample_rows[sample] = i
                self._sample_slots[sample] = row[0]
                self._sample_positions[sample] = self._positions[i] + 1
                sample += 1
        self._query_start[num_rows] = at


cdef inline int64_t _samples(const int32_t *row) noexcept:
    return row[2] if row[3] & VERIFY else row[3] & SAMPLE
