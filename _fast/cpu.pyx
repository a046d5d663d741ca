"""Native CPU backend: a step program replayed by a thread team, its buffers, weights and collectives.

The contract between the pieces, and what every op expects in `p`, `n` and `f`, is `cpu/cpu.h`. Arrays are
passed by address where the caller must keep them alive and unmoved (ops), and as buffers elsewhere.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINVAL, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset, strerror


cdef extern from "cpu/cpu.h" nogil:
    enum:
        AE_F32, AE_BF16, AE_F16
        AE_TOKENS, AE_SAMPLES
        AE_EMBED, AE_RMS_NORM, AE_ADD_RMS_NORM, AE_LINEAR, AE_ROPE_KV, AE_ATTENTION, AE_SILU_MUL, AE_SELECT
        AE_ALL_REDUCE, AE_ALL_GATHER, AE_NUM_OPS
        AE_PORTABLE, AE_AVX2, AE_AVX512, AE_AVX512BF16, AE_NUM_LEVELS

    ctypedef struct ae_step:
        int32_t num_tokens
        int32_t num_seqs
        int32_t num_samples
        int32_t table_stride
        const int32_t *token_ids
        const int32_t *positions
        const int32_t *token_row
        const int32_t *query_start
        const int32_t *context_len
        const int32_t *row_slot
        const int32_t *block_table
        const int32_t *sample_rows

    ctypedef struct ae_op:
        int32_t code
        int32_t rows
        void *p[8]
        int64_t n[8]
        float f[4]

    ctypedef struct ae_thread:
        pass

    int ae_detect_level()


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
    int ae_program_run(ae_team *team, const ae_kernels *kernels, const ae_op *ops, int64_t count, const ae_step *step)


cdef extern from "cpu/pack.h" nogil:
    ctypedef struct ae_source:
        const char *data
        int type
        int64_t rows, cols, col_start, col_stop

    enum:
        AE_SRC_F32, AE_SRC_BF16, AE_SRC_F16, AE_SRC_Q8_0, AE_SRC_Q4_0, AE_SRC_Q4_1, AE_SRC_Q4_K, AE_SRC_Q5_K, AE_SRC_Q6_K

    int ae_source_block(int type)
    int64_t ae_source_bytes(int type, int64_t count)
    int64_t ae_packed_bytes(int64_t n, int64_t k, int type)
    int ae_pack(ae_team *team, const ae_source *source, void *dst, int dst_type, int64_t row_offset)
    int ae_convert(ae_team *team, const ae_source *source, void *dst, int dst_type, int64_t row_offset)


cdef extern from "cpu/comm.h" nogil:
    ctypedef struct ae_comm:
        pass

    size_t ae_comm_bytes(int world, size_t region_bytes)
    ae_comm *ae_comm_open(int fd, int rank, int world, size_t region_bytes)
    void ae_comm_close(ae_comm *comm)
    void ae_comm_broadcast(ae_comm *comm, int32_t *tokens, int64_t count)


cdef extern from "cpu/memory.h" nogil:
    void *ae_map(size_t bytes)
    void ae_unmap(void *address, size_t bytes)


# Values of ae_op.code, ae_op.rows and of the type fields in ae_op.n.
EMBED = AE_EMBED
RMS_NORM = AE_RMS_NORM
ADD_RMS_NORM = AE_ADD_RMS_NORM
LINEAR = AE_LINEAR
ROPE_KV = AE_ROPE_KV
ATTENTION = AE_ATTENTION
SILU_MUL = AE_SILU_MUL
SELECT = AE_SELECT
ALL_REDUCE = AE_ALL_REDUCE
ALL_GATHER = AE_ALL_GATHER
TOKENS = AE_TOKENS
SAMPLES = AE_SAMPLES
F32 = AE_F32
BF16 = AE_BF16
F16 = AE_F16

_LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
_TYPES = {"F32": AE_F32, "BF16": AE_BF16, "F16": AE_F16}
_SOURCE_TYPES = {
    "F32": AE_SRC_F32,
    "BF16": AE_SRC_BF16,
    "F16": AE_SRC_F16,
    "Q8_0": AE_SRC_Q8_0,
    "Q4_0": AE_SRC_Q4_0,
    "Q4_1": AE_SRC_Q4_1,
    "Q4_K": AE_SRC_Q4_K,
    "Q5_K": AE_SRC_Q5_K,
    "Q6_K": AE_SRC_Q6_K,
}


def levels():
    """Instruction-set levels this machine can run, best last."""
    return list(_LEVELS[: ae_detect_level() + 1])


cdef int _lookup(dict table, str name, str what) except -1:
    if name not in table:
        raise ValueError(f"{what} {name!r} is not supported; use one of {', '.join(table)}")
    return table[name]


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
            level = _LEVELS[ae_detect_level()]
        if level not in available:
            raise ValueError(f"level {level!r} is not available here; this machine has {', '.join(available)}")
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
    """What changes from step to step: views of the caller's int32 arrays (see ae_step in cpu.h).

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
    ):
        self._max_tokens = min(token_ids.shape[0], positions.shape[0], token_row.shape[0])
        self._max_seqs = min(query_start.shape[0] - 1, context_len.shape[0], row_slot.shape[0])
        self._max_samples = sample_rows.shape[0]
        self._held = (
            token_ids, positions, token_row, query_start, context_len, row_slot, block_table, sample_rows
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
        if len(p) > 8 or len(n) > 8 or len(f) > 4:
            raise ValueError("an op holds at most 8 addresses, 8 integers and 4 floats")
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
            failed = ae_program_run(self.team._team, self.team._kernels, self._ops + first, count, &step._step)
        if failed:
            raise RuntimeError(_FORKED)


def source_bytes(str src_dtype not None, int64_t count):
    """Bytes of `count` stored values; ValueError unless `count` is whole blocks."""
    cdef int type = _lookup(_SOURCE_TYPES, src_dtype, "source type")
    if count < 0 or count % ae_source_block(type):
        raise ValueError(f"{count} values are not whole {src_dtype} blocks of {ae_source_block(type)}")
    return ae_source_bytes(type, count)


def packed_bytes(int64_t n, int64_t k, str dtype not None):
    """Bytes of a packed [n, k] weight of type `dtype`."""
    if n < 0 or k < 0:
        raise ValueError(f"the shape must not be negative, got [{n}, {k}]")
    return ae_packed_bytes(n, k, _lookup(_TYPES, dtype, "weight type"))


cdef _transfer(
    bint pack,
    Team team,
    str src_dtype,
    object src,
    int64_t rows,
    int64_t cols,
    object dst,
    str dst_dtype,
    int64_t row_offset,
    int64_t col_start,
    object col_stop,
):
    cdef ae_source source
    cdef int type = _lookup(_TYPES, dst_dtype, "weight type"), failed
    cdef _View data = _View(src, False), out = _View(dst, True)
    source.type = _lookup(_SOURCE_TYPES, src_dtype, "source type")
    source.rows = rows
    source.cols = cols
    source.col_start = col_start
    source.col_stop = cols if col_stop is None else col_stop
    if rows < 0 or row_offset < 0 or not 0 <= source.col_start <= source.col_stop <= cols:
        raise ValueError(
            f"rows {row_offset}..{row_offset + rows} and columns {source.col_start}..{source.col_stop}"
            f" do not lie in a source of {cols} columns"
        )
    cdef int64_t width = source.col_stop - source.col_start
    data.need(rows * source_bytes(src_dtype, cols), "the source")
    if pack:
        out.need(ae_packed_bytes(row_offset + rows, width, type), "the packed weight")
    else:
        out.need((row_offset + rows) * width * (4 if type == AE_F32 else 2), "the destination")
    source.data = <const char *>data.data
    with nogil:
        failed = (ae_pack if pack else ae_convert)(team._team, &source, out.data, type, row_offset)
    if failed:
        raise RuntimeError(_FORKED)


def pack_linear(
    Team team not None,
    str src_dtype not None,
    src,
    int64_t rows,
    int64_t cols,
    dst,
    str dst_dtype not None,
    int64_t row_offset=0,
    *,
    int64_t col_start=0,
    col_stop=None,
):
    """Packs columns [col_start, col_stop) of a stored [rows, cols] weight for LINEAR.

    They become rows [row_offset, row_offset + rows) of `dst`, a packed weight of `dst_dtype` with
    K = col_stop - col_start and `packed_bytes(N, K, dst_dtype)` bytes. `src` and `dst` are buffers or
    addresses. Runs on the whole team without the GIL.
    """
    _transfer(True, team, src_dtype, src, rows, cols, dst, dst_dtype, row_offset, col_start, col_stop)


def convert(
    Team team not None,
    str src_dtype not None,
    src,
    int64_t rows,
    int64_t cols,
    dst,
    str dst_dtype not None,
    int64_t row_offset=0,
    *,
    int64_t col_start=0,
    col_stop=None,
):
    """Like `pack_linear`, into a plain row-major [_, K] matrix: embedding tables, norms (one row), biases."""
    _transfer(False, team, src_dtype, src, rows, cols, dst, dst_dtype, row_offset, col_start, col_stop)


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
        """Copies rank 0's `tokens` into every rank's; same length everywhere. Waits for all, without the GIL."""
        cdef int32_t *data = &tokens[0] if tokens.shape[0] else NULL
        cdef int64_t count = tokens.shape[0]
        with nogil:
            ae_comm_broadcast(self._comm, data, count)


# ---- sampling ----

cdef extern from "cpu/attention.h" nogil:
    enum:
        MAX_DIM

    int64_t attention_workspace_bytes(
        int threads, int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t max_context
    )


cdef extern from "cpu/sample.h" nogil:
    ctypedef struct ae_sample:
        int64_t rows, vocab
        const float *logits
        const float *temperature
        const int32_t *top_k
        const float *top_p
        const float *min_p
        const float *presence
        const float *frequency
        const float *repetition
        const uint64_t *seed
        const int64_t *position
        const uint64_t *counts
        const uint64_t *prompt_mask
        const int32_t *banned_start
        const int32_t *banned
        const int32_t *num_logprobs
        int64_t max_logprobs
        float *workspace
        int32_t *tokens
        float *logprob
        int32_t *rank
        int32_t *top_ids
        float *top_logprobs

    size_t ae_sample_workspace(int num_threads, int64_t vocab)
    int ae_sample_run(ae_team *team, const ae_kernels *kernels, const ae_sample *args)


cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)


def attention_workspace(
    int num_threads, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t max_context
):
    """Bytes of the workspace of ATTENTION (p7, n7) that keep every thread busy in decode.

    Less is slower where few sequences have long contexts, never wrong. ValueError for heads that ATTENTION
    does not take.
    """
    if num_threads < 1 or kv_heads < 1 or q_heads < 1 or q_heads % kv_heads or max_context < 0:
        raise ValueError(
            f"no attention of {q_heads} heads over {kv_heads} KV heads, {max_context} positions"
            f" and {num_threads} threads"
        )
    if not 1 <= head_dim <= MAX_DIM:
        raise ValueError(f"head_dim must be between 1 and {MAX_DIM}, got {head_dim}")
    return attention_workspace_bytes(num_threads, q_heads, kv_heads, head_dim, max_context)


cdef int _enough(object array, int64_t rows, str name) except -1:
    if array is not None and array.shape[0] < rows:
        raise ValueError(f"{name} has {array.shape[0]} rows where {rows} are needed")
    return 0


def sample(
    Team team not None,
    uintptr_t logits,
    int64_t vocab,
    int32_t[::1] tokens not None,
    *,
    const float[::1] temperature=None,
    const int32_t[::1] top_k=None,
    const float[::1] top_p=None,
    const float[::1] min_p=None,
    const float[::1] presence=None,
    const float[::1] frequency=None,
    const float[::1] repetition=None,
    const uint64_t[::1] seed=None,
    const int64_t[::1] position=None,
    const uint64_t[::1] counts=None,
    const uint64_t[::1] prompt_mask=None,
    const int32_t[::1] banned_start=None,
    const int32_t[::1] banned=None,
    const int32_t[::1] num_logprobs=None,
    float[::1] logprob=None,
    int32_t[::1] rank=None,
    int32_t[:, ::1] top_ids=None,
    float[:, ::1] top_logprobs=None,
):
    """Draws a token into `tokens` [S] for every row of the float32 [S, vocab] matrix at address `logits`.

    What each array means, what its absence means, and the distribution that is drawn from are in
    `cpu/sample.h`; all have S rows (`banned_start` S + 1). -1 marks a row without a usable logit.
    `num_logprobs` needs the four arrays after it. Runs on the whole team without the GIL; the logits are
    not modified. ValueError for arrays that do not fit together.
    """
    cdef int64_t rows = tokens.shape[0], i
    cdef ae_sample args
    cdef int failed
    if logits == 0 or not 1 <= vocab < 1 << 31:
        raise ValueError(f"no logits of {vocab} ids at address {logits}")
    if rows == 0:
        return
    memset(&args, 0, sizeof(args))
    args.rows = rows
    args.vocab = vocab
    args.logits = <const float *>logits
    args.tokens = &tokens[0]
    if temperature is not None:
        _enough(temperature, rows, "temperature")
        args.temperature = &temperature[0]
    if top_k is not None:
        _enough(top_k, rows, "top_k")
        args.top_k = &top_k[0]
    if top_p is not None:
        _enough(top_p, rows, "top_p")
        args.top_p = &top_p[0]
    if min_p is not None:
        _enough(min_p, rows, "min_p")
        args.min_p = &min_p[0]
    if presence is not None:
        _enough(presence, rows, "presence")
        args.presence = &presence[0]
    if frequency is not None:
        _enough(frequency, rows, "frequency")
        args.frequency = &frequency[0]
    if repetition is not None:
        _enough(repetition, rows, "repetition")
        args.repetition = &repetition[0]
    if seed is not None:
        _enough(seed, rows, "seed")
        args.seed = &seed[0]
    if position is not None:
        _enough(position, rows, "position")
        args.position = &position[0]
    if counts is not None:
        _enough(counts, rows, "counts")
        args.counts = &counts[0]
    if prompt_mask is not None:
        _enough(prompt_mask, rows, "prompt_mask")
        args.prompt_mask = &prompt_mask[0]
    if banned_start is not None:
        _enough(banned_start, rows + 1, "banned_start")
        if banned is None:
            raise ValueError("banned_start needs banned")
        for i in range(rows):
            if not 0 <= banned_start[i] <= banned_start[i + 1] <= banned.shape[0]:
                raise ValueError(f"banned_start does not ascend within banned at row {i}")
        args.banned_start = &banned_start[0]
        args.banned = &banned[0] if banned.shape[0] else NULL
    if num_logprobs is not None:
        if logprob is None or rank is None or top_ids is None or top_logprobs is None:
            raise ValueError("num_logprobs needs logprob, rank, top_ids and top_logprobs")
        _enough(num_logprobs, rows, "num_logprobs")
        _enough(logprob, rows, "logprob")
        _enough(rank, rows, "rank")
        _enough(top_ids, rows, "top_ids")
        _enough(top_logprobs, rows, "top_logprobs")
        args.max_logprobs = top_ids.shape[1]
        if top_logprobs.shape[1] != top_ids.shape[1]:
            raise ValueError("top_ids and top_logprobs must have the same width")
        for i in range(rows):
            if num_logprobs[i] > args.max_logprobs:
                raise ValueError(f"row {i} wants {num_logprobs[i]} logprobs; there is room for {top_ids.shape[1]}")
        args.num_logprobs = &num_logprobs[0]
        args.logprob = &logprob[0]
        args.rank = &rank[0]
        if args.max_logprobs:
            args.top_ids = &top_ids[0, 0]
            args.top_logprobs = &top_logprobs[0, 0]
    args.workspace = <float *>aligned_alloc(64, ae_sample_workspace(team.num_threads, vocab))
    if args.workspace == NULL:
        raise MemoryError
    with nogil:
        failed = ae_sample_run(team._team, team._kernels, &args)
        free(args.workspace)
    if failed:
        raise RuntimeError(_FORKED)
