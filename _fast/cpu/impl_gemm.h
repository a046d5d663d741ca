/* Linear layers with float weights: x @ weight.T on packed weights (pack.h).
 *
 * A tile is `rows` rows of x times `panels` panels of 32 columns, its sums in registers. Every output is
 * one chain of fused multiply-adds over k in ascending order, whatever the tile, the batch or the number of
 * threads: results are bitwise the same for a row alone and in a batch. (A sum that leaves the registers
 * between blocks of k is stored as float32, which is exact.)
 *
 * Level avx512bf16, bf16 weights: x is rounded to bf16 and the processor's dot product of pairs is used,
 * with its own rounding; elsewhere bf16 and f16 weights are widened and everything is float32.
 */
#pragma once
#include "cpu.h"
#include "linear.h"
#include "simd.h"

#define PANEL_VECTORS (AE_PANEL / W)

/* The largest tile that fits the registers, and how many panels a tile of few rows takes at once, so that
 * enough independent chains hide the latency of the multiply-adds. */
#if defined(AE_LEVEL_AVX512)
#define MAX_ROWS 12
#define WIDE(rows) ((rows) <= 2 ? 4 : (rows) <= 6 ? 2 : 1)
#elif defined(AE_LEVEL_AVX2)
#define MAX_ROWS 3
#define WIDE(rows) ((rows) == 1 ? 2 : 1)
#else
#define MAX_ROWS 2
#define WIDE(rows) 1
#endif

/* Blocks for large batches: x [rows of an item, BLOCK_K] and a panel of BLOCK_K stay in the L2 cache. */
#define BLOCK_K 512

/* Converted x of a decode tile must fit the scratch. */
#define MAX_BLOCK_K ((int64_t)(AE_SCRATCH / 2 / MAX_ROWS / 64 * 64))

typedef struct tile {
    const char *x;     /* row 0 at the first k of this block; bf16 in the dot-product kernels */
    int64_t x_stride;  /* bytes */
    const char *w;     /* first panel at the first k */
    int64_t w_stride;  /* bytes between panels */
    int64_t k;         /* length of the block */
    float *out;
    int64_t out_stride;
    int64_t columns;   /* columns that exist from the first panel on */
    int resume;        /* sums continue from `out` */
} tile;

/* Tiles of many rows compute too long per line of weights for the processor to look far enough ahead. */
#define PREFETCH(line) __builtin_prefetch((line) + 2048)

#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

AE_INLINE void tile_run(const tile *t, const int type, const int rows, const int panels) {
    vf sum[12][8];
    const int vectors = panels * PANEL_VECTORS;
    EACH(m, rows) EACH(v, vectors) {
        int64_t exist = t->columns - v * W;
        const float *out = t->out + m * t->out_stride + v * W;
        if (!t->resume || exist <= 0)
            sum[m][v] = vf_zero();
        else
            sum[m][v] = exist >= W ? vf_load(out) : vf_load_n(out, (int)exist);
    }
    const char *w = t->w, *x = t->x;
    const int64_t xs = t->x_stride, ws = t->w_stride;
#define X(m, k) vf_set(((const float *)(x + (m) * xs))[k])
#define PANEL(v) (w + ((v) / PANEL_VECTORS) * ws)
#define AT(v) (((v) % PANEL_VECTORS) * W)
    if (type == AE_F32) {
        for (int64_t k = 0; k < t->k; k++, w += AE_PANEL * 4) {
            vf b[8];
            EACH(v, vectors) if (AT(v) % 16 == 0) PREFETCH(PANEL(v) + AT(v) * 4);
            EACH(v, vectors) b[v] = vf_load((const float *)PANEL(v) + AT(v));
            EACH(m, rows) {
                vf a = X(m, k);
                EACH(v, vectors) sum[m][v] = vf_fma(a, b[v], sum[m][v]);
            }
        }
    } else if (type == AE_F16) {
        for (int64_t k = 0; k < t->k; k++, w += AE_PANEL * 2) {
            vf b[8];
            EACH(v, vectors) if (AT(v) == 0) PREFETCH(PANEL(v));
            EACH(v, vectors) b[v] = vf_load_f16((const uint16_t *)PANEL(v) + AT(v));
            EACH(m, rows) {
                vf a = X(m, k);
                EACH(v, vectors) sum[m][v] = vf_fma(a, b[v], sum[m][v]);
            }
        }
    } else {
#if defined(AE_LEVEL_AVX512BF16)
        for (int64_t k = 0; k < t->k; k += 2, w += AE_PANEL * 4) {
            vi b[8];
            EACH(v, vectors) if (AT(v) % 16 == 0) PREFETCH(PANEL(v) + AT(v) * 4);
            EACH(v, vectors) b[v] = vi_load((const uint32_t *)PANEL(v) + AT(v));
            EACH(m, rows) {
                __m512bh a = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + m * xs + k * 2));
                EACH(v, vectors) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, (__m512bh)b[v]);
            }
        }
#else
        int64_t k = 0;
        for (; k + 1 < t->k; k += 2, w += AE_PANEL * 4) {
            vf even[8], odd[8];
            EACH(v, vectors) if (AT(v) % 16 == 0) PREFETCH(PANEL(v) + AT(v) * 4);
            EACH(v, vectors) {
                vi b = vi_load((const uint32_t *)PANEL(v) + AT(v));
                even[v] = vi_low_bf16(b);
                odd[v] = vi_high_bf16(b);
            }
            EACH(m, rows) {
                vf a = X(m, k), c = X(m, k + 1);
                EACH(v, vectors) sum[m][v] = vf_fma(a, even[v], sum[m][v]);
                EACH(v, vectors) sum[m][v] = vf_fma(c, odd[v], sum[m][v]);
            }
        }
        if (k < t->k) EACH(v, vectors) {
            vf b = vi_low_bf16(vi_load((const uint32_t *)PANEL(v) + AT(v)));
            EACH(m, rows) sum[m][v] = vf_fma(X(m, k), b, sum[m][v]);
        }
#endif
    }
#undef X
#undef PANEL
#undef AT
    EACH(v, vectors) {
        int64_t exist = t->columns - v * W;
        if (exist <= 0) continue;
        int n = exist < W ? (int)exist : W;
        EACH(m, rows) {
            float *out = t->out + m * t->out_stride + v * W;
            if (n == W)
                vf_store(out, sum[m][v]);
            else
                vf_store_n(out, sum[m][v], n);
        }
    }
}

typedef void (*tile_fn)(const tile *);

#define TILE(rows)                                                                               \
    static void tile_f32_##rows(const tile *t) { tile_run(t, AE_F32, rows, 1); }                 \
    static void tile_bf16_##rows(const tile *t) { tile_run(t, AE_BF16, rows, 1); }               \
    static void tile_f16_##rows(const tile *t) { tile_run(t, AE_F16, rows, 1); }                 \
    static void tile_wide_f32_##rows(const tile *t) { tile_run(t, AE_F32, rows, WIDE(rows)); }   \
    static void tile_wide_bf16_##rows(const tile *t) { tile_run(t, AE_BF16, rows, WIDE(rows)); } \
    static void tile_wide_f16_##rows(const tile *t) { tile_run(t, AE_F16, rows, WIDE(rows)); }
#define ROW(name, rows) {name##f32_##rows, name##bf16_##rows, name##f16_##rows}

TILE(1) TILE(2)
#if MAX_ROWS >= 3
TILE(3)
#endif
#if MAX_ROWS >= 12
TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif

#if MAX_ROWS >= 12
#define TABLE(name)                                                                                 \
    {ROW(name, 1), ROW(name, 2), ROW(name, 3), ROW(name, 4),  ROW(name, 5),  ROW(name, 6), \
     ROW(name, 7), ROW(name, 8), ROW(name, 9), ROW(name, 10), ROW(name, 11), ROW(name, 12)}
#elif MAX_ROWS >= 3
#define TABLE(name) {ROW(name, 1), ROW(name, 2), ROW(name, 3)}
#else
#define TABLE(name) {ROW(name, 1), ROW(name, 2)}
#endif

/* By rows - 1 and weight type. */
static const tile_fn tiles[MAX_ROWS][3] = TABLE(tile_);
static const tile_fn wide_tiles[MAX_ROWS][3] = TABLE(tile_wide_);

#if defined(AE_LEVEL_AVX512BF16)
/* x [rows, k] as bf16, an odd k padded with a zero; `stride` in elements. */
static void to_bf16(uint16_t *out, int64_t stride, const float *x, int64_t x_stride, int64_t rows,
                    int64_t k) {
    for (int64_t m = 0; m < rows; m++, out += stride, x += x_stride) {
        int64_t i = 0;
        for (; i + W <= k; i += W) vf_store_bf16(out + i, vf_load(x + i));
        if (i < k) vf_store_bf16_n(out + i, vf_load_n(x + i, (int)(k - i)), (int)(k - i + 1) & ~1);
    }
}
#endif

/* All rows of a group times the panels of a chunk, for one block of k. `t` is at the group's first row and
 * the chunk's first panel. */
static void linear_block(tile t, int type, int64_t rows, int64_t panels) {
    for (int64_t p = 0; p < panels;) {
        tile u = t;
        int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS, step = 1;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = rows * b / blocks, n = rows * (b + 1) / blocks - first;
            int wide = blocks == 1 && p + WIDE(n) <= panels;
            u.x = t.x + first * t.x_stride;
            u.out = t.out + first * t.out_stride;
            if (wide) {
                step = WIDE(n);
                wide_tiles[n - 1][type](&u);
            } else {
                tiles[n - 1][type](&u);
            }
        }
        p += step;
        t.w += step * t.w_stride;
        t.out += step * AE_PANEL;
        t.columns -= step * AE_PANEL;
    }
}

static void float_chunk(const linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                        int64_t stride, int64_t columns, const ae_thread *thread) {
    const int64_t k = l->k, panel_bytes = ae_panel_bytes(k, l->type, 0, 0);
    const int64_t most = rows <= MAX_ROWS ? MAX_BLOCK_K : BLOCK_K;
    for (int64_t start = 0; start < k; start += most) {
        const int64_t length = k - start < most ? k - start : most;
        tile t = {.x = l->x + (row * k + start) * 4,
                  .x_stride = k * 4,
                  .w = l->weight + panel * panel_bytes + ae_panel_bytes(start, l->type, 0, 0),
                  .w_stride = panel_bytes,
                  .k = length,
                  .out = out,
                  .out_stride = stride,
                  .columns = columns,
                  .resume = start > 0};
#if defined(AE_LEVEL_AVX512BF16)
        if (l->type == AE_BF16) {
            const int64_t packed = (length + 1) & ~(int64_t)1;
            to_bf16(thread->scratch, packed, (const float *)t.x, k, rows, length);
            t.x = thread->scratch;
            t.x_stride = packed * 2;
        }
#else
        (void)thread;
#endif
        linear_block(t, l->type, rows, panels);
    }
}

#undef PANEL_VECTORS
#undef MAX_ROWS
#undef WIDE
#undef BLOCK_K
#undef MAX_BLOCK_K
#undef PREFETCH
#undef EACH
#undef TILE
#undef ROW
#undef TABLE
