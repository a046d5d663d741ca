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


cdef inline bint _same(const int32_t* a, const int32_t* b, int n) noexcept:
    """Whether the n tokens before `a` are those before `b`."""
    cdef int i
    for i in range(1, n + 1):
        if a[-i] != b[-i]:
            return False
    return True


cdef int _index(NGrams* g, const Lookup* l, const int32_t* tokens, int known, int* room) except -2:
    """Enters the n-grams of the first `known` tokens, at most those of `room` ends, which is lowered.

    The position after the latest earlier occurrence of the longest n-gram that ends these tokens; -1 if there
    is none, or if this call did not come to enter it. Tables that become full are made anew, from the start,
    so that no call takes long.
    """
    cdef int n, end, found = -1
    cdef uint64_t h
    cdef int32_t* table
    cdef int64_t i, mask
    cdef size_t tables = l.most - l.least + 1
    while g.indexed < known and room[0]:
        if 4 * <int64_t>g.indexed >= 3 * g.capacity:
            free(g.cells)
            g.cells, g.capacity, g.indexed = NULL, MIN_CELLS, 0
            while g.capacity < 2 * <int64_t>known:
                g.capacity *= 2
            g.cells = <int32_t*>_alloc(tables * g.capacity * sizeof(int32_t))
        g.indexed += 1
        room[0] -= 1
        h, end, found, table, mask = 0, g.indexed, -1, g.cells, g.capacity - 1
        for n in range(1, min(l.most, end) + 1):
            h = (h ^ <uint32_t>tokens[end - n]) * l.key
            h ^= h >> 29
            if n < l.least:
                continue
            i = <int64_t>((h ^ (h >> 32)) * l.key >> 32) & mask
            while table[i] and not _same(tokens + table[i], tokens + end, n):
                i = (i + 1) & mask
            if table[i]:
                found = table[i]
            table[i] = end
            table += g.capacity
    return found if g.indexed == known else -1
