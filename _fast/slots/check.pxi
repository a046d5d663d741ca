# What must hold between slots, blocks and steps in flight.

cdef int _check_books(SlotTable table) except -1:
    cdef list refs = [0] * table.pool.num_blocks
    cdef list inflight = [0] * table.num_slots
    cdef int i, used = 0
    cdef Slot* s
    cdef Row* memo
    cdef bytes record
    table.pool.check()
    for _, _, record, _ in table.records:
        memo = <Row*><char*>record
        for i in range(<int>(len(record) // sizeof(Row))):
            if table.slots[memo[i].slot].epoch == memo[i].epoch:
                inflight[memo[i].slot] += memo[i].sampled
    for i in range(table.num_slots):
        s = &table.slots[i]
        used += s.used
        for j in range(s.blocks.size):
            refs[s.blocks.at[j]] += 1
        if not s.used:
            continue
        if not s.committed <= s.computed <= s.known + s.inflight <= s.max_len or s.known != s.tokens.size:
            raise RuntimeError(
                f"slot {i}: committed {s.committed}, computed {s.computed}, known {s.known} "
                f"({s.tokens.size} held), in flight {s.inflight}, limit {s.max_len} are out of order"
            )
        if s.inflight != inflight[i]:
            raise RuntimeError(f"slot {i}: {s.inflight} samples counted, {inflight[i]} in flight")
        if s.computed > s.blocks.size * table.pool.block_size:
            raise RuntimeError(f"slot {i}: {s.computed} positions in {s.blocks.size} blocks")
    if used != table.num_running:
        raise RuntimeError(f"{used} slots are used; {table.num_running} were counted")
    for i in range(table.pool.num_blocks):
        if refs[i] != table.pool.refs_[i]:
            raise RuntimeError(f"block {i} has {table.pool.refs_[i]} references; slots hold {refs[i]}")
    return 0
