# Speculation by prompt lookup: what a sequence's own text makes likely to come next.
#
# `source` is the position of the token that is predicted to come at position `known`; while predictions
# come true, it moves on with the sequence, whether they were drafted or only watched. `rate` is how often
# they came true of late. So a sequence that was not worth drafting for costs nothing to try again.

cdef enum:
    INDEXED_PER_STEP = 8192  # positions entered into the tables in one step: about a millisecond

cdef double FIRST_RATE = 0.5
cdef double RATE_WEIGHT = 0.125
cdef double MIN_CHANCE = 0.0625  # a draft token less likely than this is not worth its place in the step


cdef inline bint _decodes(const Slot* s) noexcept:
    """Whether the next row begins at the last token, known or in flight, and its sample is not the end."""
    return s.known + s.inflight - s.computed == 1 and s.computed + 1 < s.max_len


cdef inline bint _came_true(Slot* s, int32_t token) noexcept:
    """Learns from the token at position `known`, which is not among the tokens yet, whether it was the
    predicted one."""
    cdef bint hit
    if s.source < 0:
        return False
    hit = s.tokens.at[s.source] == token
    s.rate += RATE_WEIGHT * (hit - s.rate)
    s.source = s.source + 1 if hit else -1
    return hit


cdef int _draft(Slot* s, int count) except -1:
    """Writes the predicted tokens behind the known ones, where the commit compares them.

    What a short period repeats is copied from the draft itself.
    """
    cdef int i
    _push(&s.tokens, count)
    for i in range(count):
        s.tokens.at[s.known + i] = s.tokens.at[s.source + i]
    s.tokens.size -= count
    s.drafts = count
    return 0
