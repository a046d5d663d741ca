# Memory for weights, activations and the KV cache; views of memory that the caller owns.

cdef extern from "cpu/memory.h" nogil:
    void *ae_map(size_t bytes)
    int ae_discard(void *address, size_t bytes)
    void ae_unmap(void *address, size_t bytes)


@cython.final
cdef class Buffer:
    """`nbytes` of zeroed private memory, 64-byte aligned, on huge pages where that helps.

    Memory counts as used only once it is touched. Supports the buffer protocol (writable bytes).
    """

    cdef void *_data
    cdef readonly Py_ssize_t nbytes

    def __cinit__(self, Py_ssize_t nbytes):
        if nbytes < 0:
            raise ValueError(f"nbytes must not be negative, got {nbytes}")
        self.nbytes = nbytes
        self._data = ae_map(nbytes)
        if self._data == NULL:
            raise MemoryError(f"cannot map {nbytes} bytes: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self._data != NULL:
            ae_unmap(self._data, self.nbytes)

    @property
    def address(self):
        return <uintptr_t>self._data

    def discard(self):
        """Gives the memory back to the system; the buffer stays where it is, and zeroed."""
        if ae_discard(self._data, self.nbytes) != 0:
            raise OSError(errno, strerror(errno).decode())

    def __len__(self):
        return self.nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self._data, self.nbytes, 0, flags)


cdef class _View:
    """Address and size of a buffer or, with size -1, of memory given as an integer address."""

    cdef void *data
    cdef Py_ssize_t nbytes
    cdef Py_buffer buffer
    cdef bint held

    def __cinit__(self, object source, bint writable):
        if isinstance(source, int):
            self.data = <void *><uintptr_t>source
            self.nbytes = -1
            if self.data == NULL:
                raise ValueError("the address must not be 0")
        else:
            PyObject_GetBuffer(source, &self.buffer, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
            self.held = True
            self.data = self.buffer.buf
            self.nbytes = self.buffer.len

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)

    cdef int need(self, Py_ssize_t nbytes, str what) except -1:
        if 0 <= self.nbytes < nbytes:
            raise ValueError(f"{what} has {self.nbytes} bytes where {nbytes} are needed")
        return 0
