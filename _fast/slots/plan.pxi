# The plan that is being made, in the layout that `wire.plan` draws.

cdef enum:
    HEADER = 8  # int32 fields of the plan's and the result's header
    ROW = 4
    SAMPLE = 1
    RELAY = 2
    VERIFY = 4


@cython.final
cdef class PlanBuffer:
    """The parts of one plan, gathered in any order and joined at the end; reused for every step."""

    cdef Buffer relayed, inlined, tokens, updates, copies

    def __dealloc__(self):
        _drop(&self.relayed); _drop(&self.inlined); _drop(&self.tokens)
        _drop(&self.updates); _drop(&self.copies)

    cdef void clear(self) noexcept:
        self.relayed.size = self.inlined.size = self.tokens.size = self.updates.size = self.copies.size = 0

    cdef inline int update(self, int slot, int index, int block) except -1:
        cdef int32_t* u = _push(&self.updates, 3)
        u[0], u[1], u[2] = slot, index, block
        return 0

    cdef inline int copy(self, int source, int target) except -1:
        cdef int32_t* c = _push(&self.copies, 2)
        c[0], c[1] = source, target
        return 0

    cdef inline int row(self, int slot, int start, int count, int flags, const int32_t* tokens) except -1:
        """A row; `tokens` are its inline ones, unless it is relayed."""
        cdef int32_t* r
        if flags & RELAY:
            r = _push(&self.relayed, ROW)
        else:
            r = _push(&self.inlined, ROW)
            memcpy(_push(&self.tokens, count), tokens, count * sizeof(int32_t))
        r[0], r[1], r[2], r[3] = slot, start, count, flags
        return 0

    cdef Py_ssize_t rows(self) noexcept:
        return (self.relayed.size + self.inlined.size) // ROW

    cdef bytes join(self, int epoch, int step, bytes payload):
        cdef Py_ssize_t size = HEADER + ROW * self.rows() + self.updates.size + self.copies.size
        cdef bytes plan
        cdef int32_t* out
        size = (size + self.tokens.size) * sizeof(int32_t) + len(payload)
        plan = PyBytes_FromStringAndSize(NULL, size)
        out = <int32_t*><char*>plan
        out[0], out[1], out[2], out[3] = epoch, step, <int32_t>self.rows(), <int32_t>self.tokens.size
        out[4], out[5] = <int32_t>(self.updates.size // 3), <int32_t>(self.copies.size // 2)
        out[6], out[7] = <int32_t>len(payload), 0
        out = _append(_append(out + HEADER, &self.relayed), &self.inlined)
        out = _append(_append(_append(out, &self.updates), &self.copies), &self.tokens)
        memcpy(out, <char*>payload, len(payload))
        return plan
