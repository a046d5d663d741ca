/* Linear layers with float weights: x @ weight.T on packed weights (pack.h).
 *
 * A tile is some rows of x times a panel of 32 columns, its sums in registers. Every output is
 * one chain of fused multiply-adds over k in ascending order, whatever the tile, the batch or the number of
 * threads: results are bitwise the same for a row alone and in a batch. (A sum that leaves the registers
 * between blocks of k is stored as float32, which is exact.)
 *
 * Levels avx512bf16 and neonbf16, bf16 weights: x is rounded to bf16, unless it comes so, and the processor's dot
 * product of pairs is used, with its own rounding; elsewhere bf16 and f16 weights are widened and everything is
 * float32.
 * At level amx bf16 weights do not come here (impl_amx.h).
 */
#pragma once
#include "cpu.h"
#include "impl_quantize.h"
#include "linear.h"
#include "simd.h"
#include "tile.h"

/* Rows of the largest tile that fits the registers. */
#if defined(AE_LEVEL_AVX512)
#define TILE_ROWS 12
#elif defined(AE_LEVEL_AVX2) || defined(AE_LEVEL_NEON)
#define TILE_ROWS 3
#else
#define TILE_ROWS 2
#endif

/* Blocks of k for batches of several tiles, which share a block of a panel in the L1 cache; in large batches
 * it holds the next one too. */
#define BLOCK_K 512
#if defined(BF16_DOT)
#define LARGE_BLOCK_K 512
#else
#define LARGE_BLOCK_K 256
#endif

typedef struct tile {
    const char *x;     /* row 0 at the first k of this block; bf16 in the dot-product kernels */
    int64_t x_stride;  /* bytes */
    const char *w;     /* the panel at the first k */
    int64_t k;         /* length of the block */
    float *out;
    int64_t out_stride;
    int64_t columns;   /* that exist */
    int resume;        /* sums continue from `out` */
    ae_fetch *fetch;
    int64_t every;     /* bytes of weights after which it is asked for more: other tiles read the same ones */
    int64_t stretch;   /* k after which it is looked whether that is due */
} tile;

/* `stretch` of a batch of one tile. */
#define STRETCH 16

AE_INLINE void tile_run(const tile *t, const int type, const int rows) {
    const int held = HELD(PANEL_VECTORS);
    vf sum[TILE_ROWS][PANEL_VECTORS];
    EACH(m, rows) EACH(v, PANEL_VECTORS) {
        int64_t exist = t->columns - v * W;
        const float *out = t->out + m * t->out_stride + v * W;
        if (!t->resume || exist <= 0)
            sum[m][v] = vf_zero();
        else
            sum[m][v] = exist >= W ? vf_load(out) : vf_load_n(out, (int)exist);
    }
    const char *w = t->w;
    const int64_t stride = t->x_stride;
    const char *x[] = ROW_BASES(t->x, stride);
    const int64_t stretch_bytes = t->stretch * AE_PANEL * (type == AE_F32 ? 4 : 2);
    ae_ahead ahead = {0};
    int64_t unread = 0;
    for (int64_t left = t->k; left > 0;) {
        ae_fetch_due(t->fetch, &ahead, &unread, stretch_bytes, t->every, rows == 1 || type != AE_BF16);
        int64_t k = left < t->stretch ? left : t->stretch;
        left -= k;
        if (type == AE_F32 || type == AE_F16) {
            for (; k > 0; k--, w += AE_PANEL * (type == AE_F32 ? 4 : 2)) {
                EACH_HELD(first, PANEL_VECTORS) {
                    vf b[PANEL_VECTORS];
                    EACH(i, held) b[i] = type == AE_F32 ? vf_load((const float *)w + (first + i) * W)
                                                        : vf_load_f16((const uint16_t *)w + (first + i) * W);
                    EACH(m, rows) {
                        const vs a = vs_load((const float *)ROW(x, m, stride));
                        EACH(i, held) sum[m][first + i] = vs_fma(a, b[i], sum[m][first + i]);
                    }
                }
                NEXT_ROWS(x, rows, 4);
            }
            continue;
        }
#if defined(BF16_DOT)
        for (; k > 0; k -= 2, w += AE_PANEL * 4) {
            if (rows > 1) ae_fetch_part(&ahead);
            EACH_HELD(first, PANEL_VECTORS) {
                vi b[PANEL_VECTORS];
                EACH(i, held) b[i] = vi_load((const uint32_t *)w + (first + i) * W);
                EACH(m, rows) {
                    const bf16_pair a = bf16_pair_of(*(const int32_t *)ROW(x, m, stride));
                    EACH(i, held) sum[m][first + i] = bf16_dot(sum[m][first + i], a, b[i]);
                }
            }
            NEXT_ROWS(x, rows, 4);
        }
#else
        for (; k > 1; k -= 2, w += AE_PANEL * 4) {
            if (rows > 1) ae_fetch_part(&ahead);
            EACH_HELD(first, PANEL_VECTORS) {
                EACH(odd, 2) {
                    const char *pairs = w;
                    __asm__("" : "+r"(pairs)); /* else gcc keeps both halves in registers, and sums not */
                    vf b[PANEL_VECTORS];
                    EACH(i, held) {
                        const vi pair = vi_load((const uint32_t *)pairs + (first + i) * W);
                        b[i] = odd ? vi_high_bf16(pair) : vi_low_bf16(pair);
                    }
                    EACH(m, rows) {
                        const vs a = vs_load((const float *)ROW(x, m, stride) + odd);
                        EACH(i, held) sum[m][first + i] = vs_fma(a, b[i], sum[m][first + i]);
                    }
                }
            }
            NEXT_ROWS(x, rows, 8);
        }
        if (k > 0) /* an odd k ends so */
            EACH(v, PANEL_VECTORS) {
                const vf b = vi_low_bf16(vi_load((const uint32_t *)w + v * W));
                EACH(m, rows) sum[m][v] = vs_fma(vs_load((const float *)ROW(x, m, stride)), b, sum[m][v]);
            }
#endif
    }
    EACH(v, PANEL_VECTORS) {
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

#define TILE(rows)                                                              \
    static void tile_f32_##rows(const tile *t) { tile_run(t, AE_F32, rows); }   \
    static void tile_bf16_##rows(const tile *t) { tile_run(t, AE_BF16, rows); } \
    static void tile_f16_##rows(const tile *t) { tile_run(t, AE_F16, rows); }
#define ENTRY(rows) {tile_f32_##rows, tile_bf16_##rows, tile_f16_##rows},

UP_TO(TILE_ROWS, TILE)

/* By rows - 1 and weight type. */
static const tile_fn tiles_of[TILE_ROWS][3] = {UP_TO(TILE_ROWS, ENTRY)};

#if defined(BF16_DOT)
/* x [rows, k] as bf16, an odd k padded with a zero; `stride` in elements. */
static void to_bf16(uint16_t *out, int64_t stride, const float *x, int64_t x_stride, int64_t rows,
                    int64_t k) {
    for (int64_t m = 0; m < rows; m++) round_run(out + m * stride, x + m * x_stride, k);
}
#endif

/* All rows times one block of k of a panel. */
static void float_piece(tile t, int type, int64_t rows) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const tile start = t;
    t.every = FETCH_EVERY * tiles;
    t.stretch = STRETCH * tiles;
    ae_fetch_allow(t.fetch, ae_panel_bytes(t.k, type, 0, 0));
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = rows * i / tiles, n = rows * (i + 1) / tiles - first;
        t.x = start.x + first * t.x_stride;
        t.out = start.out + first * t.out_stride;
        tiles_of[n - 1][type](&t);
    }
}

/* A length of blocks that k comes in equal ones of, of at most `most`. Even: pairs are not parted. */
static int64_t block_length(int64_t k, int64_t most) {
    const int64_t blocks = (k + most - 1) / most;
    return ((k + blocks - 1) / blocks + 1) & ~(int64_t)1;
}

/* The block of k from `start` on, of panel p, of a chunk. */
static tile block_of(const tile *all, const linear *l, int64_t start, int64_t most, int64_t p,
                     int64_t x_bytes) {
    tile t = *all;
    t.x += start * x_bytes;
    t.w += p * ae_panel_bytes(l->k, l->type, 0, 0) + ae_panel_bytes(start, l->type, 0, 0);
    t.k = l->k - start < most ? l->k - start : most;
    t.out += p * AE_PANEL;
    t.columns -= p * AE_PANEL;
    t.resume = start > 0;
    return t;
}

/* What of x a thread converts at a time fits half of its scratch. */
#define CONVERTED_BYTES ((int64_t)(AE_SCRATCH / 2))

/* See impl_linear.h. */
static void float_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                        int64_t stride, int64_t columns, const ae_thread *thread) {
    const int64_t k = l->k, panel_bytes = ae_panel_bytes(k, l->type, 0, 0);
    int64_t x_bytes = 4;
    int64_t most = rows <= TILE_ROWS ? k : block_length(k, is_small(l) ? BLOCK_K : LARGE_BLOCK_K);
    tile all = {.x = l->x + row * k * 4,
                .x_stride = k * 4,
                .w = l->weight + panel * panel_bytes,
                .out = out,
                .out_stride = stride,
                .columns = columns,
                .fetch = thread->fetch};
    /* A small batch goes panel by panel: from front to back, as they are fetched. A large one goes block by
     * block of k, so that its x stays in the L2 cache. */
    int by_panels = is_small(l);
#if defined(BF16_DOT)
    const int convert = l->type == AE_BF16 && !l->rounded;
    const int64_t pairs = (k + 1) & ~(int64_t)1;
    const int whole = rows * pairs * 2 <= CONVERTED_BYTES;
    if (l->rounded) {
        x_bytes = 2;
        all.x_stride = ae_row8_bytes(k, AE_ROUNDED);
        all.x = l->x + row * all.x_stride;
    } else if (convert) {
        x_bytes = 2;
        all.x_stride = pairs * 2;
        if (whole) {
            if (l->converted != row) to_bf16(thread->scratch, pairs, (const float *)all.x, k, rows, k);
            l->converted = row;
            all.x = thread->scratch;
        } else {
            by_panels = 0;
            if (most > CONVERTED_BYTES / 2 / rows) most = CONVERTED_BYTES / 2 / rows & ~(int64_t)63;
        }
    }
#endif
    if (by_panels) {
        for (int64_t p = 0; p < panels; p++)
            for (int64_t start = 0; start < k; start += most)
                float_piece(block_of(&all, l, start, most, p, x_bytes), l->type, rows);
        return;
    }
    for (int64_t start = 0; start < k; start += most) {
        for (int64_t p = 0; p < panels; p++) {
            tile t = block_of(&all, l, start, most, p, x_bytes);
#if defined(BF16_DOT)
            if (convert && !whole) {
                t.x_stride = ((t.k + 1) & ~(int64_t)1) * 2;
                t.x = thread->scratch;
                if (p == 0)
                    to_bf16(thread->scratch, t.x_stride / 2, (const float *)all.x + start, k, rows, t.k);
            }
#endif
            /* Each block of a panel is fetched while the one before is multiplied. */
            const char *next = p + 1 < panels      ? t.w + panel_bytes
                               : start + most < k ? all.w + ae_panel_bytes(start + most, l->type, 0, 0)
                                                  : NULL;
            const int64_t bytes = ae_panel_bytes(t.k, l->type, 0, 0);
            ae_fetch_begin(thread->fetch, ae_block_of(t.w, bytes), bytes, ae_block_of(next, bytes));
            float_piece(t, l->type, rows);
        }
    }
}

#undef CONVERTED_BYTES
#undef TILE_ROWS
#undef BLOCK_K
#undef LARGE_BLOCK_K
#undef STRETCH
#undef TILE
#undef ENTRY
