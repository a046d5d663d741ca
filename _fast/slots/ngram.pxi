# Prompt lookup: where the last tokens of a sequence occurred in it before.
#
# A table per length n of n-grams tells where each one ended last: open addressing with linear probing, a
# cell holds the end's position + 1, 0 where it is vacant. Cells are compared by the tokens themselves, so
# a find is exact. Hashes are keyed: nobody can write a prompt whose n-grams all meet in one cell.

cdef enum:
    MAX_NGRAM = 32
    MIN_CELLS = 64


cdef struct NGrams:
    int32_t* cells  # a table of `capacity` cells, a power of two, for each length
    int64_t capacity
    int32_t indexed  # all n-grams that end before this position are in the tables


cdef struct Lookup:  # what all sequences share
    int most  # longest n-gram that is looked for; 0: no lookup at all
    int least
    uint64_t key  # odd


cdef inline int32_t* _cell(
    const NGrams* g, const Lookup* l, const int32_t* tokens, int end, int n, uint64_t h
) noexcept:
    """The cell of the n-gram that ends at position `end`, or the vacant one where it would stand."""
    cdef int32_t* table = g.cells + (n - l.least) * g.capacity
    cdef int64_t mask = g.capacity - 1, i = <int64_t>((h ^ (h >> 32)) * l.key >> 32) & mask
    while table[i] and memcmp(
        &tokens[table[i] - n], &tokens[end - n + 1], n * sizeof(int32_t)
    ):
        i = (i + 1) & mask
    return &table[i]


cdef int _index(NGrams* g, const Lookup* l, const int32_t* tokens, int end, int* room) except -1:
    """Enters the n-grams that end before position `end`, at most `room` ends, which is lowered.

    Tables that become full are made anew, from the start, so that no call takes long.
    """
    cdef int n
    cdef uint64_t h
    cdef size_t tables = l.most - l.least + 1
    while g.indexed < end and room[0]:
        if 4 * <int64_t>g.indexed >= 3 * g.capacity:
            free(g.cells)
            g.cells, g.capacity, g.indexed = NULL, MIN_CELLS, 0
            while g.capacity < 2 * <int64_t>end:
                g.capacity *= 2
            g.cells = <int32_t*>_alloc(tables * g.capacity * sizeof(int32_t))
        h = 0
        for n in range(1, min(l.most, g.indexed + 1) + 1):
            h = (h ^ <uint32_t>tokens[g.indexed - n + 1]) * l.key
            h ^= h >> 29
            if n >= l.least:
                _cell(g, l, tokens, g.indexed, n, h)[0] = g.indexed + 1
        g.indexed += 1
        room[0] -= 1
    return 0


cdef int _find_suffix(const NGrams* g, const Lookup* l, const int32_t* tokens, int known) noexcept:
    """The position after the latest occurrence of the longest n-gram that ends the first `known` tokens and
    is in the tables; -1 if there is none."""
    cdef uint64_t h = 0
    cdef int n, found = -1
    cdef int32_t cell
    if g.capacity == 0:
        return -1
    for n in range(1, min(l.most, known) + 1):
        h = (h ^ <uint32_t>tokens[known - n]) * l.key
        h ^= h >> 29
        if n >= l.least:
            cell = _cell(g, l, tokens, known - 1, n, h)[0]
            if cell == 0:
                break  # a longer one ends with this one, so it is not there either
            found = cell
    return found
