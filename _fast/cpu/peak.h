/* What this machine can do, to tell how far a step is from it: simple loops whose only limit is one unit. */
#pragma once
#include "cpu.h"

enum ae_peak_kind {
    AE_PEAK_READ, /* bytes of memory, read once each */
    AE_PEAK_F32,  /* float32 operations; a multiply-add counts as two */
    AE_PEAK_BF16, /* the same on bfloat16 values, in the way our kernels multiply them */
    AE_PEAK_INT8, /* the same on 8-bit integers */
    AE_NUM_PEAKS
};

typedef struct ae_peak {
    int kind;
    int64_t repeats; /* arithmetic: rounds of each thread */
    char *data;      /* AE_PEAK_READ: a buffer that is in memory, `bytes` in multiples of 4096 */
    int64_t bytes;
    double *done; /* [threads, AE_PEAK_STRIDE] what each thread did: bytes or operations */
} ae_peak;

/* A cache line for each thread. */
#define AE_PEAK_STRIDE 8
