/* The sizes of the KV cache and of the attention kernels that their callers must know. */
#pragma once
#include "cpu.h"

enum {
    MAX_DIM = 512,    /* largest head size */
    SPLIT = 512,      /* positions per partial result */
    TILE_KEYS = 64,
    TILE_LINES = 192, /* at most, and half of that where heads are larger than MAX_DIM / 2 */
    PARTIAL_TAIL = 16 /* floats after a partial's values: maximum, sum, and padding to a cache line */
};

/* The keys (or values) of one block of one layer are [Hk, block, D] elements. Those of AE_I8 are followed,
 * from the next cache line on, by f32 scales [Hk, block]: scale = max|x| / 127 over the D elements of a token
 * and head, code = x (127 / max|x|) rounded to nearest even. A row below 2^-120 has scale 0 and zeros; one
 * with a NaN or an infinity has scale NaN and zeros, so that it shows. Keys k are rotated before (rotate.h), and
 * queries q with them: (q R) . (k R) = N q . k, which the scale of AE_ATTENTION makes up for, but no dimension of
 * keys, of which some models have far larger ones than others, takes all of the scale. What all keys of a head have
 * in common adds the same to all scores of a query, which changes no weight: so the mean over all positions of what a
 * bias becomes is left out of keys. */
static inline int64_t ae_kv_scales_at(int64_t kv_heads, int64_t block, int64_t dim) {
    return (kv_heads * block * dim + 63) / 64 * 64;
}

/* Bytes of the keys (or values) of one block of one layer. */
static inline int64_t ae_kv_block_bytes(int type, int64_t kv_heads, int64_t block, int64_t dim) {
    if (type == AE_I8) return ae_kv_scales_at(kv_heads, block, dim) + (kv_heads * block * 4 + 63) / 64 * 64;
    return kv_heads * block * dim * (type == AE_F32 ? 4 : 2);
}

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
