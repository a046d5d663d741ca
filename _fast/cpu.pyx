"""Native CPU backend: a step program replayed by a thread team, its buffers, weights and collectives.

The contract between the pieces, and what every op expects in `p`, `n` and `f`, is `cpu/cpu.h`. Arrays are
passed by address where the caller must keep them alive and unmoved (ops), and as buffers elsewhere.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINVAL, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strerror


cdef extern from "cpu/cpu.h" nogil:
    enum:
        AE_F32, AE_BF16, AE_F16, AE_Q8, AE_Q4, AE_I8, AE_Q16
        AE_TOKENS, AE_SAMPLES
        AE_EMBED, AE_RMS_NORM, AE_LINEAR, AE_ROPE_KV, AE_ATTENTION, AE_SELECT
        AE_ALL_REDUCE, AE_ALL_GATHER, AE_QUANTIZE, AE_HEAD, AE_NUM_OPS

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
        const int32_t *head_k
        const float *head_temperature

    ctypedef struct ae_op:
        int32_t code
        int32_t rows
        void *p[8]
        int64_t n[9]
        float f[4]

    ctypedef struct ae_thread:
        pass

    int ae_supports_level(int level)


# Values of ae_op.code, ae_op.rows and of the type fields in ae_op.n.
EMBED = AE_EMBED
RMS_NORM = AE_RMS_NORM
LINEAR = AE_LINEAR
ROPE_KV = AE_ROPE_KV
ATTENTION = AE_ATTENTION
SELECT = AE_SELECT
ALL_REDUCE = AE_ALL_REDUCE
ALL_GATHER = AE_ALL_GATHER
QUANTIZE = AE_QUANTIZE
HEAD = AE_HEAD
TOKENS = AE_TOKENS
SAMPLES = AE_SAMPLES
F32 = AE_F32
BF16 = AE_BF16
F16 = AE_F16
Q8 = AE_Q8
Q4 = AE_Q4
Q16 = AE_Q16
I8 = AE_I8

OPERATION_BYTES = sizeof(ae_op)

_LEVELS = (
    "portable",
    *("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"),
    *("neon", "neondot", "neonbf16"),
)
_TYPES = {"F32": AE_F32, "BF16": AE_BF16, "F16": AE_F16}
_WEIGHT_TYPES = {**_TYPES, "Q16": AE_Q16, "Q8": AE_Q8, "Q4": AE_Q4}


def levels():
    """Instruction-set levels this machine can run, best last."""
    return [name for level, name in enumerate(_LEVELS) if ae_supports_level(level)]


cdef int _lookup(dict table, str name, str what) except -1:
    if name not in table:
        raise ValueError(f"{what} {name!r} is not supported; use one of {', '.join(table)}")
    return table[name]


include "cpu/buffer.pxi"
include "cpu/inputs.pxi"
include "cpu/program.pxi"
include "cpu/codes.pxi"
include "cpu/weights.pxi"
include "cpu/comm.pxi"
include "cpu/sample.pxi"
include "cpu/probe.pxi"
