/* The sizes of the attention kernels that their callers must know. */
#pragma once
#include "cpu.h"

enum {
    MAX_DIM = 512,    /* largest head size */
    SPLIT = 512,      /* positions per partial result */
    TILE_KEYS = 64,
    TILE_LINES = 64,
    PARTIAL_TAIL = 16 /* floats after a partial's values: maximum, sum, and padding to a cache line */
};

/* Floats of one partial result. */
static inline int64_t attention_partial(int64_t dim) { return (dim + 15) / 16 * 16 + PARTIAL_TAIL; }

/* Room for the partials of AE_ATTENTION (p7, n7) that lets every thread have a share of work in decode:
 * 2 * threads groups of query heads may be divided at once, over up to max_context positions. */
static inline int64_t attention_workspace_bytes(int threads, int64_t q_heads, int64_t kv_heads, int64_t dim,
                                                int64_t max_context) {
    if (threads < 2) return 0;
    int64_t splits = (max_context + SPLIT - 1) / SPLIT, groups = 2 * (int64_t)threads + kv_heads;
    return groups * splits * (q_heads / kv_heads) * attention_partial(dim) * (int64_t)sizeof(float);
}
