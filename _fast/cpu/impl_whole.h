/* Products with 8-bit weights of whole rows (quantized.h): sums stay in integers until a row has ended. */
#pragma once
#include "cpu.h"
#include "linear.h"
#include "quantized.h"
#include "simd_int.h"
#include "tile.h"

/* Rows of the largest tile of one panel, and of two: their sums fit the registers. Two panels take fewer loads
 * for a product, but are read in turns: only where they come from the cache. 0: not at all. */
#if defined(AE_LEVEL_AVX512VNNI)
#define TILE_ROWS 12
#define PAIR_ROWS 6
#elif defined(AE_LEVEL_AVX512)
#define TILE_ROWS 6
#define PAIR_ROWS 0
#elif defined(AE_LEVEL_NEON)
#define TILE_ROWS 3
#define PAIR_ROWS 0
#else
#define TILE_ROWS 2
#define PAIR_ROWS 0
#endif

/* Of one row: where its sums start, which is less what the weights' zero adds, and its scale. */
typedef struct whole_row {
    int32_t start;
    float scale;
} whole_row;

typedef struct whole_call {
    const int8_t *x;
    const whole_row *rows;
    const char *w; /* the panel, or the first of two */
    int64_t x_stride, k; /* k: of codes, a multiple of 32 */
    ae_fetch *fetch;
    int64_t every; /* bytes of weights after which it is asked for more: other tiles read the same ones */
    float *out;
    int64_t out_stride, columns; /* columns that exist */
} whole_call;

/* W outputs of a row, of which `exist`, from their sums. */
AE_INLINE void whole_store(float *out, vi sum, vf d, float scale, int64_t exist) {
    const vf y = vf_mul(vi_to_vf(sum), vf_mul(d, vf_set(scale)));
    if (exist >= W)
        vf_store(out, y);
    else
        vf_store_n(out, y, (int)exist);
}

#define AT(v, line) ((v) < PANEL_VECTORS ? (line) : (line) + panel_bytes) /* of vector v's panel */

AE_INLINE void whole_run(const whole_call *t, const int rows, const int panels) {
    const int64_t stride = t->x_stride, panel_bytes = (t->k + 4) * AE_PANEL;
    const int vectors = panels * PANEL_VECTORS, held = HELD(vectors);
    vi sum[TILE_ROWS][2 * PANEL_VECTORS];
    EACH(m, rows) EACH(v, vectors) sum[m][v] = vi_start(&t->rows[m].start);
    const int8_t *x[] = ROW_BASES(t->x, stride);
    const char *line = t->w + 4 * AE_PANEL;
    int64_t unread = 0;
    for (int64_t left = t->k; left; left -= 32) {
        EACH(k, 8) {
            EACH_HELD(first, vectors) {
                codes w[2 * PANEL_VECTORS];
                EACH(i, held) {
                    const int v = first + i;
                    w[i] = codes_of(vi_fetch(AT(v, line) + (k * AE_PANEL + v % PANEL_VECTORS * W) * 4));
                }
                EACH(m, rows) {
                    const signed4 a = ROW_CODES(x, m, stride, 4 * k);
                    EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], w[i], a);
                }
            }
        }
        line += 32 * AE_PANEL;
        NEXT_ROWS(x, rows, 32);
        for (unread -= panels * 32 * AE_PANEL; unread < 0; unread += t->every) ae_fetch_more(t->fetch);
    }
    EACH(v, vectors) {
        float *out = t->out + v * W;
        const int64_t exist = t->columns - v * W;
        if (exist <= 0) continue;
        const vf d = vf_load((const float *)AT(v, t->w) + v % PANEL_VECTORS * W);
        EACH(m, rows) whole_store(out + m * t->out_stride, sum[m][v], d, t->rows[m].scale, exist);
    }
}

typedef void (*whole_fn)(const whole_call *);

#define TILE(rows) \
    static void whole_##rows(const whole_call *t) { whole_run(t, rows, 1); }
#define PAIR(rows) \
    static void whole_pair_##rows(const whole_call *t) { whole_run(t, rows, 2); }

#define TILE_ENTRY(rows) whole_##rows,
#define PAIR_ENTRY(rows) whole_pair_##rows,

UP_TO(TILE_ROWS, TILE)
/* By rows - 1. */
static const whole_fn whole_tiles[TILE_ROWS] = {UP_TO(TILE_ROWS, TILE_ENTRY)};
#if PAIR_ROWS
UP_TO(PAIR_ROWS, PAIR)
static const whole_fn whole_pairs[PAIR_ROWS] = {UP_TO(PAIR_ROWS, PAIR_ENTRY)};
#endif

/* One panel, or two, times all rows of a chunk, in tiles of at most `most` rows. */
static void whole_piece(whole_call t, int64_t rows, const whole_fn *fns, int64_t most) {
    const int64_t tiles = (rows + most - 1) / most;
    const whole_call first = t;
    t.every = FETCH_EVERY * tiles;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
        t.x = first.x + row * t.x_stride;
        t.rows = first.rows + row;
        t.out = first.out + row * t.out_stride;
        fns[count - 1](&t);
    }
}

/* The first panel of a chunk. What is prepared of its rows lies at the start of the thread's scratch. */
static whole_call whole_begin(const linear *l, int64_t row, int64_t rows, int64_t panel, float *out,
                              int64_t stride, int64_t columns, const ae_thread *thread) {
    const int64_t row_bytes = ae_row8_bytes(l->k, AE_WHOLE);
    whole_row *prepared = thread->scratch;
    whole_call t = {.x = (const int8_t *)l->x + row * row_bytes,
                    .rows = prepared,
                    .w = l->weight + panel * ae_whole_panel_bytes(l->k),
                    .x_stride = row_bytes,
                    .k = ae_group_width(l->k, AE_WHOLE),
                    .fetch = thread->fetch,
                    .out = out,
                    .out_stride = stride,
                    .columns = columns};
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *row8 = t.x + r * row_bytes;
        prepared[r] = (whole_row){(CODES_ZERO - 128) * *ae_row8_sums(row8, l->k, AE_WHOLE),
                                  *ae_row8_scales(row8, l->k, AE_WHOLE)};
    }
    return t;
}

/* Has the next `taken` of the `panels` that are left fetched: those of a small batch are, from front to back,
 * already; of a large one, while the ones before are multiplied. */
static void whole_fetch(const linear *l, const whole_call *t, int64_t taken, int64_t panels) {
    const int64_t panel_bytes = ae_whole_panel_bytes(l->k), bytes = taken * panel_bytes;
    if (!is_small(l)) {
        const int64_t after = panels - taken < taken ? panels - taken : taken;
        ae_fetch_begin(t->fetch, t->w, bytes, ae_region_of(t->w + bytes, after * panel_bytes));
    }
    ae_fetch_allow(t->fetch, bytes);
}

/* To the panel so many further. */
static void whole_next(const linear *l, whole_call *t, int64_t taken) {
    t->w += taken * ae_whole_panel_bytes(l->k);
    t->out += taken * AE_PANEL;
    t->columns -= taken * AE_PANEL;
}

/* See impl_linear.h. */
static void whole_chunk(const linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                        int64_t stride, int64_t columns, const ae_thread *thread) {
    whole_call t = whole_begin(l, row, rows, panel, out, stride, columns, thread);
    for (int64_t taken; panels; panels -= taken) {
        const int in_pairs = PAIR_ROWS && !is_small(l) && panels > 1;
        taken = 1 + in_pairs;
        whole_fetch(l, &t, taken, panels);
#if PAIR_ROWS
        if (in_pairs)
            whole_piece(t, rows, whole_pairs, PAIR_ROWS);
        else
#endif
            whole_piece(t, rows, whole_tiles, TILE_ROWS);
        whole_next(l, &t, taken);
    }
}

#undef TILE_ROWS
#undef PAIR_ROWS
#undef AT
#undef TILE
#undef PAIR
#undef TILE_ENTRY
#undef PAIR_ENTRY
