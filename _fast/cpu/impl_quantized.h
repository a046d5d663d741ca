/* Products with quantized weights (quantized.h): codes times codes in integers, group by group.
 *
 * The work of a chunk goes by pieces: a panel, or for few rows several, times a block of columns. A tile is a
 * piece times the rows whose sums, in integers and in floats, fit the registers. Between blocks the float sums
 * wait in `out`. While a piece is computed, the next one is fetched into the L2 cache.
 *
 * 4-bit codes are spread to bytes by every tile anew: that is hidden behind the dot products, where a copy in
 * bytes would double what is read.
 */
#pragma once
#include "cpu.h"
#include "linear.h"
#include "quantized.h"
#include "simd_int.h"

/* A panel of bytes, its scales and a tile's x fit the L1 cache. */
#define BLOCK_COLUMNS 768
#define BLOCK_GROUPS (BLOCK_COLUMNS / 32)
#define CHUNK_ROWS 128 /* whose int_row fit the scratch */

/* The largest tile, and the most panels of a piece: its sums, integer and float, fit the registers. */
#define MAX_TILE_ROWS 7
#if defined(AE_LEVEL_AVX512VNNI)
#define TILE_ROWS 7
#define TILE_PANELS(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#elif defined(AE_LEVEL_AVX512)
#define TILE_ROWS 6
#define TILE_PANELS(rows) ((rows) == 1 ? 2 : 1)
#else
#define TILE_ROWS 2
#define TILE_PANELS(rows) 1
#endif

/* Of one row in a block, by group: where its sums start (INT_BIAS less what the weights' zero adds), its
 * scale, and scale * sum, with which minima are multiplied. */
typedef struct int_row {
    int32_t start[BLOCK_GROUPS];
    float scale[BLOCK_GROUPS], scaled_sum[BLOCK_GROUPS];
} int_row;
_Static_assert(sizeof(int_row) * CHUNK_ROWS <= AE_SCRATCH / 2, "does not fit the scratch");

typedef struct int_tile {
    const int8_t *x;
    const int_row *rows;
    const char *w;        /* group 0 of panel 0 */
    int64_t w_stride;     /* bytes between panels */
    int64_t x_stride, group, groups;
    const char *ahead;    /* what this tile fetches of the next piece: so many lines of each panel per group */
    int64_t ahead_lines;
    float *out;
    int64_t out_stride, columns; /* columns that exist from the first panel on */
    int minimum, resume;
} int_tile;

#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define PANEL_VECTORS (AE_PANEL / W)
#define LANE(v) ((v) % PANEL_VECTORS * W)
/* Three rows share a base address, so that the addresses of all rows fit the registers. */
#define X(m, k) signed4_set(*(const int32_t *)(x[(m) / 3] + (m) % 3 * stride + (k)))
#define CODES(v, k) vi_fetch(line + (v) / PANEL_VECTORS * t->w_stride + ((k) * AE_PANEL + LANE(v)) * 4)

#define HALVES(v) ((const uint16_t *)(w + (v) / PANEL_VECTORS * t->w_stride) + LANE(v))

/* Columns of vector v that exist. */
AE_INLINE int lanes(const int_tile *t, int v) {
    const int64_t exist = t->columns - v * W;
    return exist >= W ? W : exist > 0 ? (int)exist : 0;
}

AE_INLINE void int_run(const int_tile *t, const int bits, const int rows, const int panels) {
    const int vectors = panels * PANEL_VECTORS;
    const int64_t stride = t->x_stride;
    vf total[MAX_TILE_ROWS][8];
    if (!t->resume)
        EACH(m, rows) EACH(v, vectors) total[m][v] = vf_zero();
    else
        EACH(m, rows) EACH(v, vectors) total[m][v] = vf_load_n(t->out + m * t->out_stride + v * W, lanes(t, v));
    const int8_t *x[3] = {t->x, t->x + 3 * stride, t->x + 6 * stride};
    const int64_t group_bytes = ae_group_bytes(bits == 8 ? AE_Q8 : AE_Q4, t->group, t->minimum);
    const int64_t header = t->minimum ? 128 : 64;
    const char *w = t->w, *ahead = t->ahead;
    for (int64_t g = 0; g < t->groups; g++, w += group_bytes) {
        vi sum[MAX_TILE_ROWS][8];
        EACH(m, rows) EACH(v, vectors) sum[m][v] = vi_start(&t->rows[m].start[g]);
        const char *line = w + header;
        for (int64_t left = t->group; left; left -= 32) {
            if (bits == 4) {
                EACH(k, 4) {
                    codes low[8], high[8];
                    EACH(v, vectors) {
                        const vi both = CODES(v, k);
                        low[v] = codes_of(vi_low_nibbles(both));
                        high[v] = codes_of(vi_high_nibbles(both));
                    }
                    EACH(m, rows) {
                        const signed4 a = X(m, 8 * k), b = X(m, 8 * k + 4);
                        EACH(v, vectors) sum[m][v] = dot(sum[m][v], low[v], a);
                        EACH(v, vectors) sum[m][v] = dot(sum[m][v], high[v], b);
                    }
                }
                line += 16 * AE_PANEL;
            } else {
                EACH(k, 8) {
                    codes both[8];
                    EACH(v, vectors) both[v] = codes_of(CODES(v, k));
                    EACH(m, rows) {
                        const signed4 a = X(m, 4 * k);
                        EACH(v, vectors) sum[m][v] = dot(sum[m][v], both[v], a);
                    }
                }
                line += 32 * AE_PANEL;
            }
            EACH(i, (rows + 2) / 3) x[i] += 32;
        }
        for (int64_t i = 0; i < t->ahead_lines; i++, ahead += 64)
            EACH(p, panels) __builtin_prefetch(ahead + p * t->w_stride, 0, 2);
        EACH(v, vectors) {
            const vf d = vf_load_f16(HALVES(v)), biased = vf_mul(d, vf_set(-INT_BIAS_FLOAT));
            EACH(m, rows) total[m][v] = add_scaled(total[m][v], sum[m][v], d, biased, &t->rows[m].scale[g]);
        }
    }
    if (t->minimum) {
        w = t->w;
        for (int64_t g = 0; g < t->groups; g++, w += group_bytes)
            EACH(v, vectors) {
                const vf minima = vf_load_f16(HALVES(v) + AE_PANEL);
                EACH(m, rows) total[m][v] = vf_fma(minima, vf_set(t->rows[m].scaled_sum[g]), total[m][v]);
            }
    }
    if (t->columns >= vectors * W)
        EACH(m, rows) EACH(v, vectors) vf_store(t->out + m * t->out_stride + v * W, total[m][v]);
    else
        EACH(m, rows) EACH(v, vectors) vf_store_n(t->out + m * t->out_stride + v * W, total[m][v], lanes(t, v));
}

typedef void (*int_fn)(const int_tile *);

#define TILE_OF(rows, panels)                                                                  \
    static void int_q8_##rows##_##panels(const int_tile *t) { int_run(t, 8, rows, panels); } \
    static void int_q4_##rows##_##panels(const int_tile *t) { int_run(t, 4, rows, panels); }
#define ENTRY(rows, panels) {int_q8_##rows##_##panels, int_q4_##rows##_##panels}

TILE_OF(1, 1) TILE_OF(2, 1)
#if TILE_ROWS >= 6
TILE_OF(3, 1) TILE_OF(4, 1) TILE_OF(5, 1) TILE_OF(6, 1) TILE_OF(1, 2)
#endif
#if TILE_ROWS >= 7
TILE_OF(7, 1) TILE_OF(2, 2) TILE_OF(3, 2) TILE_OF(1, 4)
#endif

/* By width; then 8 and 4 bits. */
static int_fn int_tile_for(int64_t rows, int64_t panels, int narrow) {
    static const int_fn single[TILE_ROWS][2] = {
        ENTRY(1, 1), ENTRY(2, 1),
#if TILE_ROWS >= 6
        ENTRY(3, 1), ENTRY(4, 1), ENTRY(5, 1), ENTRY(6, 1),
#endif
#if TILE_ROWS >= 7
        ENTRY(7, 1),
#endif
    };
#if TILE_ROWS >= 7
    static const int_fn wide[3][2] = {ENTRY(1, 2), ENTRY(2, 2), ENTRY(3, 2)}, widest[2] = ENTRY(1, 4);
    if (panels == 4) return widest[narrow];
    if (panels == 2) return wide[rows - 1][narrow];
#elif TILE_ROWS >= 6
    static const int_fn wide[2] = ENTRY(1, 2);
    if (panels == 2) return wide[narrow];
#else
    (void)panels;
#endif
    return single[rows - 1][narrow];
}

/* The largest piece of at most `panels` panels. */
static int64_t piece_panels(int64_t rows, int64_t panels) {
    int64_t most = TILE_PANELS(rows);
    while (most > panels) most /= 2;
    return most;
}

static void prepare_row(int_row *out, const int8_t *row8, const linear *l, int64_t first, int64_t groups) {
    const float *scale = ae_row8_scales(row8, l->k, l->group) + first;
    const int32_t *sum = ae_row8_sums(row8, l->k, l->group) + first;
    const int32_t zero = l->minimum ? 0 : l->type == AE_Q8 ? 128 : 8;
    for (int64_t g = 0; g < groups; g++) {
        out->start[g] = INT_BIAS - zero * sum[g];
        out->scale[g] = scale[g];
        out->scaled_sum[g] = scale[g] * (float)sum[g];
    }
}

/* A piece times all rows of a chunk; `t` is set but for what depends on the tile. */
static void int_piece(int_tile t, int64_t rows, int64_t panels, int narrow, const char *next) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t lines = ae_group_bytes(narrow ? AE_Q4 : AE_Q8, t.group, t.minimum) / 64;
    const int_tile first = t;
    t.ahead_lines = (lines + tiles - 1) / tiles;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
        t.x = first.x + row * t.x_stride;
        t.rows = first.rows + row;
        t.out = first.out + row * t.out_stride;
        t.ahead = next + i * t.ahead_lines * t.groups * 64;
        int_tile_for(count, panels, narrow)(&t);
    }
}

/* See linear_chunk. */
static void quantized_chunk(const linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                            float *out, int64_t stride, int64_t columns, const ae_thread *thread) {
    int_row *prepared = thread->scratch;
    const int64_t row_bytes = ae_row8_bytes(l->k, l->group), all = ae_groups(l->k, l->group);
    const int64_t panel_bytes = ae_panel_bytes(l->k, l->type, l->group, l->minimum);
    const int64_t group_bytes = ae_group_bytes(l->type, l->group, l->minimum);
    const int64_t most = BLOCK_COLUMNS / l->group, blocks = (all + most - 1) / most;
    for (; rows > 0; row += CHUNK_ROWS, rows -= CHUNK_ROWS, out += CHUNK_ROWS * stride) {
        const int64_t taken = rows < CHUNK_ROWS ? rows : CHUNK_ROWS;
        const int8_t *x = (const int8_t *)l->x + row * row_bytes;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = all * b / blocks, groups = all * (b + 1) / blocks - first;
            const char *block = l->weight + panel * panel_bytes + first * group_bytes;
            for (int64_t r = 0; r < taken; r++)
                prepare_row(prepared + r, x + r * row_bytes, l, first, groups);
            for (int64_t p = 0, count; p < panels; p += count) {
                count = piece_panels(taken, panels - p);
                const int_tile t = {.x = x + first * l->group,
                                    .rows = prepared,
                                    .w = block + p * panel_bytes,
                                    .w_stride = panel_bytes,
                                    .x_stride = row_bytes,
                                    .group = l->group,
                                    .groups = groups,
                                    .out = out + p * AE_PANEL,
                                    .out_stride = stride,
                                    .columns = columns - p * AE_PANEL,
                                    .minimum = l->minimum,
                                    .resume = b > 0};
                /* After the last panels come the first ones' next block, or those of the next chunk. */
                const int turn = p + count == panels && b + 1 < blocks;
                const char *next = turn ? block + groups * group_bytes : t.w + count * panel_bytes;
                int_piece(t, taken, count, l->type == AE_Q4, next);
            }
        }
    }
}

#undef BLOCK_COLUMNS
#undef BLOCK_GROUPS
#undef CHUNK_ROWS
#undef TILE_ROWS
#undef TILE_PANELS
#undef MAX_TILE_ROWS
#undef EACH
#undef PANEL_VECTORS
#undef LANE
#undef X
#undef CODES
#undef HALVES
#undef TILE_OF
#undef ENTRY
