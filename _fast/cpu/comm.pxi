# Collectives between ranks.

cdef extern from "cpu/comm.h" nogil:
    ctypedef struct ae_comm:
        pass

    size_t ae_comm_bytes(int world, size_t region_bytes)
    ae_comm *ae_comm_open(int fd, int rank, int world, size_t region_bytes)
    void ae_comm_close(ae_comm *comm)
    void ae_comm_broadcast(ae_comm *comm, int32_t *tokens, int64_t count)


@cython.final
cdef class Comm:
    """Collectives between the ranks of a model through the shared mapping `fd` (a zeroed memfd).

    Messages larger than `region_bytes` go in chunks. All ranks must issue the same operations in the same
    order. The descriptor may be closed afterwards. ValueError if the ranks disagree about the sizes or the
    file is smaller than `bytes_needed`.
    """

    cdef ae_comm *_comm
    cdef readonly int rank, world

    def __cinit__(self, int fd, int rank, int world, Py_ssize_t region_bytes):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        if region_bytes < 64:
            raise ValueError(f"region_bytes must be at least 64, got {region_bytes}")
        self.rank = rank
        self.world = world
        self._comm = ae_comm_open(fd, rank, world, region_bytes)
        if self._comm == NULL:
            if errno == EINVAL:
                raise ValueError(
                    f"the shared file does not fit {world} ranks with regions of {region_bytes} bytes:"
                    " it is too small, or another rank opened it with other sizes"
                )
            raise OSError(errno, f"cannot map the shared file: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self._comm != NULL:
            ae_comm_close(self._comm)

    @staticmethod
    def bytes_needed(int world, Py_ssize_t region_bytes):
        """Size of the shared file."""
        return ae_comm_bytes(world, region_bytes)

    @property
    def address(self):
        """What ALL_REDUCE and ALL_GATHER take as `ae_comm`."""
        return <uintptr_t>self._comm

    def broadcast_tokens(self, int32_t[::1] tokens):
        """Copies rank 0's `tokens` into every rank's; same length everywhere.

        Waits for all ranks, without the GIL.
        """
        cdef int32_t *data = &tokens[0] if tokens.shape[0] else NULL
        cdef int64_t count = tokens.shape[0]
        with nogil:
            ae_comm_broadcast(self._comm, data, count)
