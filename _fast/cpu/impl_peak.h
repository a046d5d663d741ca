/* See peak.h. A round of arithmetic is an outer product of PEAK_A by PEAK_B registers: enough independent
 * sums to hide the latency, and no product that could be shared or moved out of the loop. */
#pragma once
#include "peak.h"
#include "simd_int.h"
#if defined(AE_LEVEL_AMX)
#include "impl_amx_block.h"
#endif

#if defined(AE_LEVEL_AVX512) || defined(AE_LEVEL_NEON)
#define PEAK_A 4
#define PEAK_B 4
#else
#define PEAK_A 2
#define PEAK_B 4
#endif

/* The operands could be others in every round, as far as the compiler knows. */
#define PEAK_TOUCH(x) __asm__ volatile("" : "+m"(x))
/* A copy, so that the sum itself may live in a register. */
#define PEAK_KEEP(x)                          \
    do {                                      \
        __typeof__(x) kept = (x);             \
        __asm__ volatile("" ::"m"(kept));     \
    } while (0)

/* ZERO, A, B: initial values; STEP(sum, a, b). Returns the number of STEPs. */
#define PEAK_LOOP(SUM_TYPE, A_TYPE, B_TYPE, ZERO, A, B, STEP)                      \
    SUM_TYPE sum[PEAK_A][PEAK_B];                                                  \
    A_TYPE a_source[PEAK_A], a[PEAK_A];                                            \
    B_TYPE b_source[PEAK_B];                                                       \
    EACH(i, PEAK_A) a_source[i] = A;                                               \
    EACH(j, PEAK_B) b_source[j] = B;                                               \
    EACH(i, PEAK_A) EACH(j, PEAK_B) sum[i][j] = ZERO;                              \
    for (int64_t r = 0; r < repeats; r++) {                                        \
        PEAK_TOUCH(a_source);                                                      \
        PEAK_TOUCH(b_source);                                                      \
        EACH(i, PEAK_A) a[i] = a_source[i];                                        \
        EACH(j, PEAK_B) {                                                          \
            const B_TYPE b = b_source[j];                                          \
            EACH(i, PEAK_A) sum[i][j] = STEP(sum[i][j], a[i], b);                  \
        }                                                                          \
    }                                                                              \
    EACH(i, PEAK_A) EACH(j, PEAK_B) PEAK_KEEP(sum[i][j]);                          \
    return (double)repeats * PEAK_A * PEAK_B

static double peak_f32(int64_t repeats) {
#define STEP(sum, a, b) vf_fma(a, b, sum)
    PEAK_LOOP(vf, vf, vf, vf_zero(), vf_set(0.5f), vf_set(1.0f), STEP) * (2 * W);
#undef STEP
}

#if defined(AE_LEVEL_AMX)
/* Two tiles by two, as linears have them. */
AE_INLINE double peak_tiles(int64_t repeats, const int int8) {
    uint16_t ones[TILE_ROWS_MAX * TILE_ROW_BYTES / 2] __attribute__((aligned(64)));
    const int k = int8 ? TILE_ROW_BYTES : TILE_ROW_BYTES / 2;
    EACH(i, TILE_ROWS_MAX * TILE_ROW_BYTES / 2) ones[i] = 0x3F80;
    configure_tiles(BLOCK_ROWS);
    TILE_LOAD(4, ones, TILE_ROW_BYTES);
    TILE_LOAD(5, ones, TILE_ROW_BYTES);
    TILE_LOAD(6, ones, TILE_ROW_BYTES);
    TILE_LOAD(7, ones, TILE_ROW_BYTES);
    for (int64_t r = 0; r < repeats; r++) {
        TILE_DOT(int8, 0, 4, 6);
        TILE_DOT(int8, 1, 4, 7);
        TILE_DOT(int8, 2, 5, 6);
        TILE_DOT(int8, 3, 5, 7);
    }
    TILE_RELEASE();
    return (double)repeats * 4 * (2 * TILE_ROWS_MAX * (TILE_ROW_BYTES / 4) * k);
}

static double peak_bf16(int64_t repeats) { return peak_tiles(repeats, 0); }
#elif defined(BF16_DOT)
static double peak_bf16(int64_t repeats) {
#define STEP(sum, a, b) bf16_dot(sum, a, b)
    PEAK_LOOP(vf, bf16_pair, vi, vf_zero(), bf16_pair_of(0x3F003F00), vi_set(0x3F803F80), STEP) * (4 * W);
#undef STEP
}
#else
/* Widened to float32, which costs more than nothing; the multiplications alone set the bound. */
static double peak_bf16(int64_t repeats) { return peak_f32(repeats); }
#endif

#if defined(AE_LEVEL_AMX)
static double peak_int8(int64_t repeats) { return peak_tiles(repeats, 1); }
#else
static double peak_int8(int64_t repeats) {
#define STEP(sum, a, b) dot(sum, a, b)
    PEAK_LOOP(vi, codes, signed4, vi_set(0), codes_of(vi_set(0x01020304)), signed4_set(0x01FF02FE), STEP) *
        (8 * W);
#undef STEP
}
#endif

static double peak_read(const ae_peak *peak, const ae_thread *thread) {
    int64_t lo, hi;
    ae_share(thread, peak->bytes, 4096, &lo, &hi);
    vf sum[4];
    EACH(i, 4) sum[i] = vf_zero();
    ae_fetch fetch = {0};
    if (ae_fetch_pays(1)) {
        ae_fetch_begin(&fetch, ae_region_of(peak->data + lo, hi - lo), hi - lo, (ae_region){0});
        ae_fetch_allow(&fetch, hi - lo);
    }
    for (const char *p = peak->data + lo, *end = peak->data + hi; p < end; p += 256) {
        if ((p - peak->data) % AE_FETCH_BYTES == 0) ae_fetch_more(&fetch);
        for (int j = 0; j < 256; j += 16 * W)
            EACH(i, 4) sum[i] = vf_add(sum[i], vf_load((const float *)(p + j + 4 * W * i)));
    }
    EACH(i, 4) PEAK_KEEP(sum[i]);
    return (double)(hi - lo);
}

static void k_peak(const ae_peak *peak, const ae_thread *thread) {
    double *done = peak->done + (int64_t)AE_PEAK_STRIDE * thread->tid;
    switch (peak->kind) {
    case AE_PEAK_READ: *done = peak_read(peak, thread); break;
    case AE_PEAK_F32: *done = peak_f32(peak->repeats); break;
    case AE_PEAK_BF16: *done = peak_bf16(peak->repeats); break;
    default: *done = peak_int8(peak->repeats);
    }
}

#undef PEAK_A
#undef PEAK_B
#undef PEAK_TOUCH
#undef PEAK_KEEP
#undef PEAK_LOOP
