# What the host knows of one running sequence.
#
# A sequence runs in a slot. Steps are planned ahead of results, so a slot's length is known only in
# part; four ordered integers say how far it is:
#   committed <= computed <= known + inflight <= max_len
#   committed  positions whose keys and values are computed for sure
#   computed   positions planned to be computed
#   known      tokens the host holds; `inflight` more are sampled by planned steps
# Tokens sampled in a slot stay with the worker: the next step names them (RELAY) without sending them.
# A row that verifies drafts samples once per draft token and once more, so it counts 1 + `drafts` in flight.
# How far the sequence has come shows in the result: until then it gets no other row, and then `computed`
# goes back to where the drafts went wrong. What was computed beyond is written over by later rows.

cdef struct Slot:
    uint32_t epoch  # counts the residents; a row of an earlier one is recognised by it
    int32_t known
    int32_t inflight
    int32_t computed
    int32_t committed
    int32_t max_len
    int32_t min_len
    int32_t relay  # position of the token last sampled here, or -1
    int32_t published  # leading blocks that need no (further) publishing
    int32_t num_stops
    bint ignore_eos
    bint publishes
    bint used
    bint drafting  # whether tokens are drafted for it
    bint waits  # it is worth more to know its last token than to take part in the next step
    int32_t drafts  # draft tokens in flight
    int32_t source  # position of the token predicted to come next, or -1
    double rate  # share of predictions that came true
    double rank
    int64_t serial
    Hash hash  # identity of the first `published` blocks
    int32_t* stops
    Buffer tokens
    Buffer blocks
    NGrams ngrams


cdef struct Row:  # what the host remembers of a planned row until its result comes
    int32_t slot
    uint32_t epoch
    int32_t end
    int32_t sampled  # samples


cdef void _clear(Slot* s) noexcept:
    """Back to an empty slot of the next epoch. The blocks must have been given back."""
    cdef uint32_t epoch = s.epoch + 1
    _drop(&s.tokens)
    _drop(&s.blocks)
    free(s.stops)
    free(s.ngrams.cells)
    memset(s, 0, sizeof(Slot))
    s.epoch = epoch


cdef int _set_stops(Slot* s, const int32_t* ids, int count) except -1:
    s.stops = <int32_t*>_alloc(count * sizeof(int32_t))
    s.num_stops = count
    if count:
        memcpy(s.stops, ids, count * sizeof(int32_t))
    return 0


cdef inline bint _in(int32_t token, const int32_t* ids, int count) noexcept:
    cdef int i
    for i in range(count):
        if ids[i] == token:
            return True
    return False
