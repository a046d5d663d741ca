"""The shared-memory ring between the host and its workers; the protocol is explained in `ring/ring.h`."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t

import os

cdef extern from "ring/ring.h" nogil:
    enum:
        RING_MAX_READERS
        RING_EVENTFD
    const uint64_t RING_MAX_CAPACITY
    const int64_t RING_FOREVER
    int EINTR, EBADMSG, ERANGE, ETIMEDOUT

    struct ring_shared:
        uint32_t num_readers

    struct ring_map:
        ring_shared *shared
        uint64_t capacity

    struct ring_writer:
        ring_map map
        int *eventfd

    struct ring_reader:
        ring_map map
        uint64_t tail

    struct ring_record:
        uint32_t length
        uint32_t kind
        char *data

    int64_t ring_now()
    uint64_t ring_footprint(uint64_t n)
    int ring_create(uint64_t capacity, uint32_t num_readers)
    int ring_open_writer(ring_writer *w, int fd)
    int ring_open_reader(ring_reader *r, int fd, uint32_t index)
    void ring_detach(ring_map *m)
    ring_record *ring_at(const ring_map *m, uint64_t position)
    bint ring_put(ring_writer *w, uint32_t kind, const void *a, size_t na, const void *b, size_t nb)
    int ring_wait_space(ring_writer *w, uint64_t need, int64_t deadline)
    bint ring_has_record(ring_reader *r)
    void ring_advance(ring_reader *r)
    bint ring_arm(ring_reader *r, uint32_t how)
    int ring_wait_record(ring_reader *r, int64_t spin_ns, int64_t deadline)


cdef extern from "unistd.h":
    long sysconf(int name)
    int _SC_PAGESIZE


MAX_READERS = RING_MAX_READERS


def create(capacity, num_readers):
    cdef uint64_t size = <uint64_t>sysconf(_SC_PAGESIZE)
    if not 1 <= num_readers <= RING_MAX_READERS:
        raise ValueError(f"num_readers must be 1 to {RING_MAX_READERS}, not {num_readers}")
    if not 1 <= capacity <= RING_MAX_CAPACITY:
        raise ValueError(f"capacity must be 1 to {RING_MAX_CAPACITY} bytes, not {capacity}")
    while size < <uint64_t>capacity:
        size *= 2
    cdef int fd = ring_create(size, num_readers)
    if fd < 0:
        refuse(-fd)
    return fd


cdef int refuse(int error) except -1:
    raise OSError(error, os.strerror(error))


cdef int64_t deadline_of(timeout) except -1:
    """Seconds from now, None for never, as nanoseconds of CLOCK_MONOTONIC."""
    if timeout is None or timeout > 1e9:
        return RING_FOREVER
    return ring_now() + <int64_t>(max(timeout, 0.0) * 1e9)


cdef class RingWriter:
    cdef ring_writer w
    cdef bint waiting

    def __cinit__(self, int fd):
        cdef int rc = ring_open_writer(&self.w, fd)
        if rc == -EBADMSG:
            raise ValueError(f"descriptor {fd} is not a ring made by create()")
        if rc < 0:
            refuse(-rc)

    def __dealloc__(self):
        ring_detach(&self.w.map)

    cdef int check(self) except -1:
        if self.w.map.shared == NULL:
            raise ValueError("the ring is closed")
        if self.waiting:
            raise RuntimeError("another thread is in write(): a ring has one writer")
        return 0

    cdef int put(self, uint32_t kind, a, b, int64_t deadline) except -1:
        """1: written; 0: no space before the deadline, where 0 does not wait."""
        cdef Py_buffer x, y
        cdef int rc
        cdef uint64_t need
        self.check()
        PyObject_GetBuffer(a, &x, PyBUF_SIMPLE)
        cdef bint two = False
        y.buf = NULL
        y.len = 0
        try:
            if b is not None:
                PyObject_GetBuffer(b, &y, PyBUF_SIMPLE)
                two = True
            need = ring_footprint(x.len + y.len)
            if need > self.w.map.capacity:
                raise ValueError(
                    f"a record of {x.len + y.len} bytes does not fit: max_record is {self.max_record} bytes"
                )
            while not ring_put(&self.w, kind, x.buf, x.len, y.buf, y.len):
                if deadline == 0:
                    return 0
                self.waiting = True
                with nogil:
                    rc = ring_wait_space(&self.w, need, deadline)
                self.waiting = False
                if rc == -ETIMEDOUT:
                    return 0
                if rc == -EINTR:
                    PyErr_CheckSignals()
                elif rc < 0:
                    refuse(-rc)
            return 1
        finally:
            PyBuffer_Release(&x)
            if two:
                PyBuffer_Release(&y)

    def try_write(self, uint32_t kind, data):
        return self.put(kind, data, None, 0) == 1

    def try_write2(self, uint32_t kind, a, b):
        return self.put(kind, a, b, 0) == 1

    def write(self, uint32_t kind, data, timeout=None):
        return self.put(kind, data, None, deadline_of(timeout)) == 1

    def attach_eventfd(self, uint32_t reader_index, int fd):
        self.check()
        if reader_index >= self.w.map.shared.num_readers:
            raise ValueError(f"the ring has no reader {reader_index}: it was made with fewer")
        self.w.eventfd[reader_index] = fd

    @property
    def max_record(self):
        return self.w.map.capacity - ring_footprint(0)

    @property
    def num_readers(self):
        self.check()
        return self.w.map.shared.num_readers

    def close(self):
        if self.w.map.shared != NULL:
            self.check()
            ring_detach(&self.w.map)


cdef class RingReader:
    cdef ring_reader r
    cdef bint waiting

    def __cinit__(self, int fd, uint32_t index):
        cdef int rc = ring_open_reader(&self.r, fd, index)
        if rc == -EBADMSG:
            raise ValueError(f"descriptor {fd} is not a ring made by create()")
        if rc == -ERANGE:
            raise ValueError(f"the ring has no reader {index}: it was made with fewer")
        if rc < 0:
            refuse(-rc)

    def __dealloc__(self):
        ring_detach(&self.r.map)

    cdef int check(self) except -1:
        if self.r.map.shared == NULL:
            raise ValueError("the ring is closed")
        if self.waiting:
            raise RuntimeError("another thread is in read(): a reader belongs to one thread")
        return 0

    cdef tuple take(self):
        """The record at the tail, which is there."""
        cdef ring_record *record = ring_at(&self.r.map, self.r.tail)
        data = PyBytes_FromStringAndSize(record.data, record.length)
        cdef tuple taken = (record.kind, data)
        ring_advance(&self.r)
        return taken

    def try_read(self):
        self.check()
        return self.take() if ring_has_record(&self.r) else None

    def read(self, timeout=None, double spin_us=0.0):
        self.check()
        cdef int64_t deadline, spin_ns = <int64_t>(min(max(spin_us, 0.0), 1e9) * 1e3)
        cdef int rc
        if ring_has_record(&self.r):
            return self.take()
        deadline = deadline_of(timeout)
        while True:
            self.waiting = True
            with nogil:
                rc = ring_wait_record(&self.r, spin_ns, deadline)
            self.waiting = False
            if rc == 0:
                return self.take()
            if rc == -ETIMEDOUT:
                return None
            if rc != -EINTR:
                refuse(-rc)
            PyErr_CheckSignals()

    def arm(self):
        self.check()
        return ring_arm(&self.r, RING_EVENTFD)

    def close(self):
        if self.r.map.shared != NULL:
            self.check()
            ring_detach(&self.r.map)
