# What a step's result makes of the sequences that were in it.

cdef bint _check_result(const uint8_t[::1] result, int epoch, int step, int count) except -1:
    """Whether the result has a payload. Raises RuntimeError if it does not answer that step, with `count`
    samples."""
    cdef int32_t header[HEADER]
    cdef Py_ssize_t size = result.shape[0]
    if size < <Py_ssize_t>sizeof(header):
        raise RuntimeError(f"step {step}: a result of {size} bytes has no header")
    memcpy(header, &result[0], sizeof(header))
    if header[0] != epoch or header[1] != step or header[2] != count:
        raise RuntimeError(
            f"the result of epoch {header[0]}, step {header[1]} with {header[2]} samples does not answer "
            f"epoch {epoch}, step {step} with {count} samples"
        )
    if size != <Py_ssize_t>sizeof(header) + 4 * count + header[3]:
        raise RuntimeError(f"step {step}: a result of {size} bytes contradicts its own header")
    return header[3] > 0


cdef tuple _commit(SlotTable table, const uint8_t[::1] result):
    cdef list progressed = [], tokens = [], ended = [], sampled = None
    cdef Py_ssize_t i, rows
    cdef int step, count, planned, row = 0, got, j
    cdef bytes record
    cdef const Row* memo
    cdef const uint8_t* samples
    cdef Slot* s
    if not table.records:
        raise RuntimeError("a result came though no step is in flight")
    step, count, record, planned = table.records[0]
    if _check_result(result, table.epoch, step, count):
        sampled = [None] * count
    table.records.popleft()
    table.sampled_only = planned if planned == count else 0
    samples = &result[0] + HEADER * sizeof(int32_t)
    memo = <const Row*><char*>record
    rows = len(record) // <Py_ssize_t>sizeof(Row)
    for i in range(rows):
        s = &table.slots[memo.slot]
        if s.used and s.epoch == memo.epoch:
            owner = table.owners[memo.slot]
            got = _commit_row(table, s, memo, samples, row, owner, progressed, tokens, ended)
            if sampled is not None:
                for j in range(row, row + got):
                    sampled[j] = owner
        row += memo.sampled
        memo += 1
    return progressed, tokens, ended, sampled


cdef inline int _commit_row(
    SlotTable table, Slot* s, const Row* memo, const uint8_t* samples, int first, object owner,
    list progressed, list tokens, list ended,
) except -1:
    """Appends the tokens of a row whose first sample is number `first`: all up to an ending, or up to the
    first that is not the draft token in its place. How many these are."""
    cdef int got = 0, wrong
    cdef int32_t token
    cdef bint goes_on = True
    s.inflight -= memo.sampled
    while got < memo.sampled and goes_on:
        memcpy(&token, samples + sizeof(int32_t) * (first + got), sizeof(int32_t))
        if token < 0:
            _distrust(table, s)
            ended.append((owner, "error", first + got))
            return got
        goes_on = _came_true(s, token)
        _push(&s.tokens, 1)[0] = token
        s.known += 1
        got += 1
        progressed.append(owner)
        tokens.append(token)
        if s.known > s.min_len and not s.ignore_eos and _in(token, table.eos, table.num_eos):
            ended.append((owner, "stop", None))
            break
        elif s.known > s.min_len and _in(token, s.stops, s.num_stops):
            ended.append((owner, "stop", token))
            break
        elif s.known == s.max_len:
            ended.append((owner, "length", None))
            break
    wrong = memo.sampled - got
    if memo.sampled > 1:
        table.drafts += 1
        table.draft_tokens += s.drafts
        table.accepted_tokens += s.drafts - wrong
        s.computed = memo.end - wrong
        s.drafts = 0
    s.committed = memo.end - wrong
    if s.publishes:
        while (s.published + 1) * table.pool.block_size <= s.committed:
            s.hash = table.pool._extend(s.hash, s.tokens.at + s.published * table.pool.block_size)
            table.pool._publish(s.blocks.at[s.published], s.hash)
            s.published += 1
    return got


cdef void _distrust(SlotTable table, Slot* s) noexcept:
    """A failed sequence may have computed nonsense: nobody shall find its blocks."""
    cdef Py_ssize_t i
    for i in range(s.blocks.size):
        table.pool._forget(s.blocks.at[i])
