/* A linear layer as the chunk kernels see it (impl_gemm.h: float weights, impl_quantized.h: integers). */
#pragma once
#include "compact.h"
#include "cpu.h"
#include "pack.h"
#include "quantized.h"

typedef struct linear {
    const char *x;      /* [m, k] float32, or quantized rows for quantized weights, or rounded rows */
    const char *weight; /* [n, k], packed */
    const float *bias;  /* [n], or NULL; added by the frame, not by the chunk kernels */
    int64_t m, n, k;
    int64_t group; /* of quantized weights */
    int type, minimum, rounded, compact;
    int64_t panels; /* of 32 columns: n rounded up, for a gated pair each half of n rounded up */
    const void *prepared; /* by prepare_quantized; NULL: nothing */
    int64_t converted;    /* the row from which on the scratch holds an item's x as bf16; -1: none */
} linear;

/* Panel p; where the last one ends, for p = panels. */
static inline const char *panel_at(const linear *l, int64_t p) {
    if (l->compact) return ae_compact_at(l->weight, p);
    return l->weight + p * ae_panel_bytes(l->k, l->type, l->group, l->minimum);
}

/* Rows of an item of a large batch: what they read of x stays in the L2 cache. One of no more is small. */
#define GROUP_ROWS 96

static inline int is_small(const linear *l) { return l->m <= GROUP_ROWS; }

/* The bytes that a tile reads before it asks for more, where no other tile reads the same: somewhat less than
 * what it gets, for regions end in odd places. */
#define FETCH_EVERY (AE_FETCH_BYTES * 15 / 16)
