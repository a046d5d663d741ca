# The thread team, what a step brings, and the recorded program.

cdef extern from "cpu/team.h" nogil:
    ctypedef struct ae_team:
        pass

    ae_team *ae_team_create(int nthreads)
    void ae_team_destroy(ae_team *team)
    int ae_team_run(ae_team *team, void (*job)(void *, const ae_thread *) noexcept nogil, void *arg)


cdef extern from "cpu/kernels.h" nogil:
    ctypedef struct ae_kernels:
        pass

    const ae_kernels *ae_kernels_for(int level)


cdef extern from "cpu/program.h" nogil:
    int ae_program_run(
        ae_team *team, const ae_kernels *kernels, const ae_op *ops, int64_t count, const ae_step *step
    )


_FORKED = "the thread team belongs to the parent process; create a Team in this process"


@cython.final
cdef class Team:
    """`num_threads` threads that run programs, the calling thread included.

    Signals are blocked in the others. `level` picks the instruction set; None takes the best here.
    Raises OSError if the threads cannot be created.
    """

    cdef ae_team *_team
    cdef const ae_kernels *_kernels
    cdef readonly int num_threads
    cdef readonly str level

    def __cinit__(self, int num_threads, str level=None):
        cdef list available = levels()
        if level is None:
            level = available[len(available) - 1]
        if level not in available:
            have = ", ".join(available)
            raise ValueError(f"level {level!r} is not available here; this machine has {have}")
        if not 1 <= num_threads <= 1024:
            raise ValueError(f"num_threads must be between 1 and 1024, got {num_threads}")
        self.level = level
        self.num_threads = num_threads
        self._kernels = ae_kernels_for(_LEVELS.index(level))
        self._team = ae_team_create(num_threads)
        if self._team == NULL:
            raise OSError(errno, f"cannot start {num_threads} threads: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self._team != NULL:
            with nogil:
                ae_team_destroy(self._team)


@cython.final
cdef class Step:
    """What changes from step to step: views of the caller's arrays (see ae_step in cpu.h), int32 but for
    the float32 `head_temperature`. Without the two of the head, HEAD stores every row.

    The arrays are held, not copied, and may be rewritten between steps; set the three counts before each
    run. They must lie within the arrays; what the arrays say is not checked.
    """

    cdef ae_step _step
    cdef tuple _held
    cdef Py_ssize_t _max_tokens, _max_seqs, _max_samples

    def __cinit__(
        self,
        *,
        const int32_t[::1] token_ids,
        const int32_t[::1] positions,
        const int32_t[::1] token_row,
        const int32_t[::1] query_start,
        const int32_t[::1] context_len,
        const int32_t[::1] row_slot,
        const int32_t[:, ::1] block_table,
        const int32_t[::1] sample_rows,
        const int32_t[::1] head_k=None,
        const float[::1] head_temperature=None,
    ):
        self._max_tokens = min(token_ids.shape[0], positions.shape[0], token_row.shape[0])
        self._max_seqs = min(query_start.shape[0] - 1, context_len.shape[0], row_slot.shape[0])
        self._max_samples = sample_rows.shape[0]
        if (head_k is None) != (head_temperature is None):
            raise ValueError("head_k and head_temperature need each other")
        if head_k is not None:
            self._max_samples = min(sample_rows.shape[0], head_k.shape[0], head_temperature.shape[0])
            self._step.head_k = &head_k[0] if head_k.shape[0] else NULL
            self._step.head_temperature = &head_temperature[0] if head_temperature.shape[0] else NULL
        self._held = (
            token_ids, positions, token_row, query_start, context_len, row_slot, block_table, sample_rows,
            head_k, head_temperature,
        )
        # An empty array has no first element to point at, and none is ever read.
        self._step.token_ids = &token_ids[0] if token_ids.shape[0] else NULL
        self._step.positions = &positions[0] if positions.shape[0] else NULL
        self._step.token_row = &token_row[0] if token_row.shape[0] else NULL
        self._step.query_start = &query_start[0] if query_start.shape[0] else NULL
        self._step.context_len = &context_len[0] if context_len.shape[0] else NULL
        self._step.row_slot = &row_slot[0] if row_slot.shape[0] else NULL
        self._step.block_table = &block_table[0, 0] if block_table.size else NULL
        self._step.sample_rows = &sample_rows[0] if sample_rows.shape[0] else NULL
        self._step.table_stride = block_table.shape[1]

    def set_counts(self, Py_ssize_t num_tokens, Py_ssize_t num_seqs, Py_ssize_t num_samples):
        """The lengths in use of the token, sequence and sample arrays."""
        if not (
            0 <= num_tokens <= self._max_tokens
            and 0 <= num_seqs <= max(self._max_seqs, 0)
            and 0 <= num_samples <= self._max_samples
        ):
            raise ValueError(
                f"counts ({num_tokens} tokens, {num_seqs} sequences, {num_samples} samples) exceed the arrays"
                f" ({self._max_tokens}, {self._max_seqs}, {self._max_samples})"
            )
        self._step.num_tokens = num_tokens
        self._step.num_seqs = num_seqs
        self._step.num_samples = num_samples

    @property
    def num_tokens(self):
        return self._step.num_tokens

    @property
    def num_seqs(self):
        return self._step.num_seqs

    @property
    def num_samples(self):
        return self._step.num_samples


@cython.final
cdef class Program:
    """Ops in the order they were added, run by `team`.

    Ops hold plain addresses: whoever adds an op keeps its memory alive as long as the program runs.
    """

    cdef readonly Team team
    cdef ae_op *_ops
    cdef Py_ssize_t _count, _room

    def __cinit__(self, Team team not None):
        self.team = team

    def __dealloc__(self):
        free(self._ops)

    def __len__(self):
        return self._count

    def add(self, int code, int rows, p, n=(), f=()):
        """Appends an op; returns its index. Fields that are not given are zero."""
        if not 0 <= code < AE_NUM_OPS:
            raise ValueError(f"op code {code} is unknown")
        if rows not in (AE_TOKENS, AE_SAMPLES):
            raise ValueError(f"rows must be TOKENS or SAMPLES, got {rows}")
        if len(p) > 8 or len(n) > 9 or len(f) > 4:
            raise ValueError("an op holds at most 8 addresses, 9 integers and 4 floats")
        if self._count == self._room:
            room = 2 * self._room + 64
            ops = <ae_op *>realloc(self._ops, room * sizeof(ae_op))
            if ops == NULL:
                raise MemoryError
            self._ops = ops
            self._room = room
        cdef ae_op *op = &self._ops[self._count]
        memset(op, 0, sizeof(ae_op))
        op.code = code
        op.rows = rows
        for i, address in enumerate(p):
            op.p[i] = <void *><uintptr_t>address
        for i, number in enumerate(n):
            op.n[i] = number
        for i, number in enumerate(f):
            op.f[i] = number
        self._count += 1
        return self._count - 1

    def run(self, Step step not None):
        """Replays all ops. Releases the GIL. RuntimeError in a forked child."""
        self._run(0, self._count, step)

    def run_op(self, Py_ssize_t i, Step step not None):
        """Runs op `i` alone."""
        if not 0 <= i < self._count:
            raise IndexError(f"op {i} of a program of {self._count}")
        self._run(i, 1, step)

    cdef _run(self, Py_ssize_t first, Py_ssize_t count, Step step):
        cdef int failed
        with nogil:
            failed = ae_program_run(
                self.team._team, self.team._kernels, self._ops + first, count, &step._step
            )
        if failed:
            raise RuntimeError(_FORKED)
