/* Products with weights of whole rows (quantized.h): sums stay in integers until a row has ended.
 *
 * A panel of 4-bit codes that more than two tiles take is spread to bytes first, in this thread's scratch; else
 * tiles spread what they take. */
#pragma once
#include "cpu.h"
#include "linear.h"
#include "quantized.h"
#include "simd_int.h"
#include "tile.h"

/* Rows of the largest tile of one panel, of one in 4 bits, and of two: their sums fit the registers. Two panels
 * take fewer loads for a product, but are read in turns: only where they come from the cache. 0: not at all. */
#if defined(AE_LEVEL_AVX512VNNI)
#define TILE_ROWS 12
#define Q4_ROWS 10
#define PAIR_ROWS 6
#elif defined(AE_LEVEL_AVX512)
#define TILE_ROWS 6
#define Q4_ROWS 6
#define PAIR_ROWS 0
#elif defined(AE_LEVEL_NEON)
#define TILE_ROWS 3
#define Q4_ROWS 3
#define PAIR_ROWS 0
#else
#define TILE_ROWS 2
#define Q4_ROWS 2
#define PAIR_ROWS 0
#endif

/* Of one row: where its sums start, which is less what the weights' zero adds, and its scale. With 16 bits
 * (impl_whole16.h) `start` is that of high parts, `mixed_start` that of high times low ones. */
typedef struct whole_row {
    int32_t start, mixed_start;
    float scale;
} whole_row;

typedef struct whole_call {
    const int8_t *x;
    const whole_row *rows;
    const char *w; /* the panel, or the first of two */
    int64_t x_stride, k; /* k: of codes, a multiple of 32 */
    ae_fetch *fetch;
    int64_t every; /* bytes of w after which it is asked for more: other tiles read the same ones */
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

/* Where the panel of vector v lies behind the first one. */
#define PANEL_OF(v) ((v) < PANEL_VECTORS ? 0 : panel_bytes)

AE_INLINE void whole_run(const whole_call *t, const int bits, const int rows, const int panels) {
    const int type = bits == 8 ? AE_Q8 : AE_Q4;
    const int64_t stride = t->x_stride, panel_bytes = ae_whole_panel_bytes(t->k, type);
    const int vectors = panels * PANEL_VECTORS, held = HELD(vectors);
    vi sum[TILE_ROWS][2 * PANEL_VECTORS];
    EACH(m, rows) EACH(v, vectors) sum[m][v] = vi_start(&t->rows[m].start);
    const int8_t *x[] = ROW_BASES(t->x, stride);
    const char *w = t->w + AE_WHOLE_SCALES;
    ae_ahead ahead = {0};
    int64_t unread = 0;
    for (int64_t left = t->k; left; left -= 32) {
        ae_fetch_due(t->fetch, &ahead, &unread, panels * ae_whole_part_bytes(type), t->every, rows == 1);
        if (bits == 4) {
            steps by[PANEL_VECTORS];
            EACH(v, PANEL_VECTORS) by[v] = steps_of((const uint8_t *)w + v * W * 2);
            EACH(k, 4) {
                if (rows > 1) ae_fetch_part(&ahead);
                EACH_HELD(first, PANEL_VECTORS) {
                    codes low[PANEL_VECTORS], high[PANEL_VECTORS];
                    EACH(i, held) {
                        const vi both = vi_fetch(w + AE_WHOLE_STEPS + k * LINE_BYTES + IN_LINE(first + i));
                        low[i] = codes_of(vi_low_codes(both, by[first + i]));
                        high[i] = codes_of(vi_high_codes(both, by[first + i]));
                    }
                    EACH(m, rows) {
                        const signed4 a = ROW_CODES(x, m, stride, 8 * k);
                        const signed4 b = ROW_CODES(x, m, stride, 8 * k + 4);
                        EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], low[i], a);
                        EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], high[i], b);
                    }
                }
            }
        } else {
            EACH(k, 8) {
                if (rows > 1) ae_fetch_part(&ahead);
                EACH_HELD(first, vectors) {
                    codes line[2 * PANEL_VECTORS];
                    EACH(i, held) {
                        const int v = first + i;
                        line[i] = codes_of(vi_fetch(w + PANEL_OF(v) + k * LINE_BYTES + IN_LINE(v)));
                    }
                    EACH(m, rows) {
                        const signed4 a = ROW_CODES(x, m, stride, 4 * k);
                        EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], line[i], a);
                    }
                }
            }
        }
        w += ae_whole_part_bytes(type);
        NEXT_ROWS(x, rows, 32);
    }
    EACH(v, vectors) {
        float *out = t->out + v * W;
        const int64_t exist = t->columns - v * W;
        if (exist <= 0) continue;
        const vf d = vf_load((const float *)(t->w + PANEL_OF(v) + IN_LINE(v)));
        EACH(m, rows) whole_store(out + m * t->out_stride, sum[m][v], d, t->rows[m].scale, exist);
    }
}

typedef void (*whole_fn)(const whole_call *);

#define TILE(rows) \
    static void whole_##rows(const whole_call *t) { whole_run(t, 8, rows, 1); }
#define Q4(rows) \
    static void whole_q4_##rows(const whole_call *t) { whole_run(t, 4, rows, 1); }
#define PAIR(rows) \
    static void whole_pair_##rows(const whole_call *t) { whole_run(t, 8, rows, 2); }

#define TILE_ENTRY(rows) whole_##rows,
#define Q4_ENTRY(rows) whole_q4_##rows,
#define PAIR_ENTRY(rows) whole_pair_##rows,

UP_TO(TILE_ROWS, TILE)
UP_TO(Q4_ROWS, Q4)
/* By rows - 1. */
static const whole_fn whole_tiles[TILE_ROWS] = {UP_TO(TILE_ROWS, TILE_ENTRY)};
static const whole_fn whole_q4_tiles[Q4_ROWS] = {UP_TO(Q4_ROWS, Q4_ENTRY)};
#if PAIR_ROWS
UP_TO(PAIR_ROWS, PAIR)
static const whole_fn whole_pairs[PAIR_ROWS] = {UP_TO(PAIR_ROWS, PAIR_ENTRY)};
#endif

/* One panel, or two, times all rows of a chunk, in tiles of at most `most` rows. */
static void whole_piece(whole_call t, int64_t rows, const whole_fn *fns, int64_t most) {
    const int64_t tiles = (rows + most - 1) / most;
    const whole_call first = t;
    t.every = first.every * tiles;
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
    const int64_t row_bytes = ae_row8_bytes(l->k, l->group);
    whole_row *prepared = thread->scratch;
    whole_call t = {.x = (const int8_t *)l->x + row * row_bytes,
                    .rows = prepared,
                    .w = l->weight + panel * ae_whole_panel_bytes(l->k, l->type),
                    .x_stride = row_bytes,
                    .k = ae_group_width(l->k, l->group),
                    .fetch = thread->fetch,
                    .every = FETCH_EVERY,
                    .out = out,
                    .out_stride = stride,
                    .columns = columns};
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *row8 = t.x + r * row_bytes;
        const int32_t *sums = ae_row8_sums(row8, l->k, l->group), zero = 128 - CODES_ZERO;
        prepared[r] = (whole_row){.start = -zero * sums[0], .scale = *ae_row8_scales(row8, l->k, l->group)};
        if (l->group == AE_WHOLE16) prepared[r].mixed_start = -zero * (sums[0] + sums[1]);
    }
    return t;
}

/* Has the next `taken` of the `panels` that are left fetched: those of a small batch are, from front to back,
 * already; of a large one, while the ones before are multiplied. */
static void whole_fetch(const linear *l, const whole_call *t, int64_t taken, int64_t panels) {
    const int64_t panel_bytes = ae_whole_panel_bytes(l->k, l->type), bytes = taken * panel_bytes;
    if (!is_small(l)) {
        const int64_t after = panels - taken < taken ? panels - taken : taken;
        ae_fetch_begin(t->fetch, ae_block_of(t->w, bytes), bytes, ae_block_of(t->w + bytes, after * panel_bytes));
    }
    ae_fetch_allow(t->fetch, bytes);
}

/* To the panel so many further. */
static void whole_next(const linear *l, whole_call *t, int64_t taken) {
    t->w += taken * ae_whole_panel_bytes(l->k, l->type);
    t->out += taken * AE_PANEL;
    t->columns -= taken * AE_PANEL;
}

/* Where panels lie that are spread: behind what is prepared of rows, and the AMX level's sums. */
#define SPREAD_AT ((int64_t)16384)

static int can_spread(const linear *l, int64_t panels) {
    return panels * ae_whole_panel_bytes(l->k, AE_Q8) <= (int64_t)AE_SCRATCH / 2 - SPREAD_AT;
}

/* The call with panels of 4 bits as 8-bit ones of the same values. */
static whole_call spread(whole_call t, int64_t panels, const ae_thread *thread) {
    const char *w = t.w;
    char *out = (char *)thread->scratch + SPREAD_AT;
    t.w = out;
    t.every = FETCH_EVERY * ae_whole_part_bytes(AE_Q8) / ae_whole_part_bytes(AE_Q4);
    for (; panels; panels--) {
        memcpy(out, w, AE_WHOLE_SCALES);
        w += AE_WHOLE_SCALES;
        out += AE_WHOLE_SCALES;
        for (int64_t k = 0; k < t.k; k += 32) {
            EACH(v, PANEL_VECTORS) {
                const steps by = steps_of((const uint8_t *)w + v * W * 2);
                EACH(line, 4) {
                    const vi both = vi_load(w + AE_WHOLE_STEPS + line * LINE_BYTES + IN_LINE(v));
                    vi_store(out + 2 * line * LINE_BYTES + IN_LINE(v), vi_low_codes(both, by));
                    vi_store(out + (2 * line + 1) * LINE_BYTES + IN_LINE(v), vi_high_codes(both, by));
                }
            }
            w += ae_whole_part_bytes(AE_Q4);
            out += ae_whole_part_bytes(AE_Q8);
        }
    }
    return t;
}

/* See impl_linear.h. */
static void whole_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                        int64_t stride, int64_t columns, const ae_thread *thread) {
    whole_call t = whole_begin(l, row, rows, panel, out, stride, columns, thread);
    const int spreads = l->type == AE_Q4 && rows > 2 * Q4_ROWS && can_spread(l, PAIR_ROWS ? 2 : 1);
    const int is_q4 = l->type == AE_Q4 && !spreads, pairs = PAIR_ROWS && !is_small(l) && !is_q4;
    for (int64_t taken; panels; panels -= taken) {
        const int in_pairs = pairs && panels > 1;
        taken = 1 + in_pairs;
        whole_fetch(l, &t, taken, panels);
        const whole_call now = spreads ? spread(t, taken, thread) : t;
#if PAIR_ROWS
        if (in_pairs)
            whole_piece(now, rows, whole_pairs, PAIR_ROWS);
        else
#endif
            whole_piece(now, rows, is_q4 ? whole_q4_tiles : whole_tiles, is_q4 ? Q4_ROWS : TILE_ROWS);
        whole_next(l, &t, taken);
    }
}

#undef TILE_ROWS
#undef Q4_ROWS
#undef PAIR_ROWS
#undef PANEL_OF
#undef SPREAD_AT
#undef TILE
#undef PAIR
#undef TILE_ENTRY
#undef Q4
#undef Q4_ENTRY
#undef PAIR_ENTRY
