# Memory of the scheduler's tables.

cdef void* _alloc(size_t size) except NULL:
    cdef void* block = calloc(1, size if size else 1)
    if block is NULL:
        raise MemoryError(f"no memory for {size} bytes of scheduler state")
    return block


cdef struct Buffer:  # a growing array of int32
    int32_t* at
    Py_ssize_t size
    Py_ssize_t capacity


cdef inline int32_t* _push(Buffer* b, Py_ssize_t count) except NULL:
    """Room for `count` more values at the end."""
    cdef Py_ssize_t capacity
    cdef int32_t* at
    if b.size + count > b.capacity:
        capacity = max(2 * b.capacity, b.size + count, 16)
        at = <int32_t*>realloc(b.at, capacity * sizeof(int32_t))
        if at is NULL:
            raise MemoryError("no memory for the scheduler's arrays")
        b.at, b.capacity = at, capacity
    b.size += count
    return b.at + b.size - count


cdef inline void _drop(Buffer* b) noexcept:
    free(b.at)
    memset(b, 0, sizeof(Buffer))


cdef inline int32_t* _append(int32_t* out, Buffer* b) noexcept:
    if b.size:
        memcpy(out, b.at, b.size * sizeof(int32_t))
    return out + b.size
