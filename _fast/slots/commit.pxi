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
    cdef Py_ssize_t i
    cdef int step, count, planned, row = 0
    cdef bytes record
    cdef Row* memo
    cdef Slot* s
    if not table.records:
        raise RuntimeError("a result came though no step is in flight")
    step, count, record, planned = table.records[0]
    if _check_result(result, table.epoch, step, count):
        sampled = [None] * count
    table.records.popleft()
    table.sampled_only = planned if planned == count else 0
    memo = <Row*><char*>record
    for i in range(<Py_ssize_t>(len(record) // sizeof(Row))):
        s = &table.slots[memo[i].slot]
        if s.used and s.epoch == memo[i].epoch:
            count = <int>len(tokens)
            _commit_row(table, s, &memo[i], result, row, tokens, ended)
            count = <int>len(tokens) - count
            owner = table.owners[memo[i].slot]
            progressed.extend([owner] * count)
            if sampled is not None:
                sampled[row : row + count] = [owner] * count
        row += memo[i].sampled
    return progressed, tokens, ended, sampled


cdef int _commit_row(
    SlotTable table, Slot* s, const Row* memo, const uint8_t[::1] result, int row, list tokens, list ended
) except -1:
    """Appends the tokens of a row whose first sample is the result's number `row`: all up to an ending, or
    up to the first that is not the draft token in its place."""
    cdef int i, wrong = 0
    cdef int32_t token
    cdef bint ends = False, hit = True
    owner = table.owners[memo.slot]
    s.inflight -= memo.sampled
    for i in range(memo.sampled):
        if ends or not hit:
            wrong += 1
            continue
        memcpy(&token, &result[sizeof(int32_t) * (HEADER + row + i)], sizeof(int32_t))
        if token < 0:
            _distrust(table, s)
            ended.append((owner, "error", row + i))
            return 0
        hit = _came_true(s, token)
        _push(&s.tokens, 1)[0] = token
        s.known += 1
        tokens.append(token)
        ends = True
        if s.known > s.min_len and not s.ignore_eos and _in(token, table.eos, table.num_eos):
            ended.append((owner, "stop", None))
        elif s.known > s.min_len and _in(token, s.stops, s.num_stops):
            ended.append((owner, "stop", token))
        elif s.known == s.max_len:
            ended.append((owner, "length", None))
        else:
            ends = False
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
    return 0


cdef void _distrust(SlotTable table, Slot* s) noexcept:
    """A failed sequence may have computed nonsense: nobody shall find its blocks."""
    cdef Py_ssize_t i
    for i in range(s.blocks.size):
        table.pool._forget(s.blocks.at[i])
