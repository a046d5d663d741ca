/* Products with weights of whole rows of 16 bits (quantized.h), in integers: three products of bytes for one,
 * which is less than one of floats where an instruction takes four times as many bytes. */
#pragma once
#include "impl_whole.h"

/* Rows of the largest tile, whose two sums for each output fit the registers. */
#if defined(AE_LEVEL_AVX512VNNI)
#define TILE_ROWS 6
#else
#define TILE_ROWS 2
#endif

AE_INLINE void whole16_run(const whole_call *t, const int rows) {
    const int held = HELD(PANEL_VECTORS);
    const int64_t stride = t->x_stride, low = t->k;
    vi high[TILE_ROWS][PANEL_VECTORS], mixed[TILE_ROWS][PANEL_VECTORS];
    EACH(m, rows) EACH(v, PANEL_VECTORS) {
        high[m][v] = vi_start(&t->rows[m].start);
        mixed[m][v] = vi_start(&t->rows[m].mixed_start);
    }
    const int8_t *x[] = ROW_BASES(t->x, stride);
    const char *w = t->w + AE_WHOLE_SCALES;
    ae_ahead ahead = {0};
    int64_t unread = 0;
    for (int64_t left = t->k; left; left -= 32) {
        ae_fetch_due(t->fetch, &ahead, &unread, ae_whole_part_bytes(AE_Q16), t->every, rows == 1);
        EACH(k, 8) {
            if (rows > 1) ae_fetch_part(&ahead);
            EACH_HELD(first, PANEL_VECTORS) {
                codes highs[PANEL_VECTORS], lows[PANEL_VECTORS];
                EACH(i, held) {
                    const char *line = w + 2 * k * LINE_BYTES + IN_LINE(first + i);
                    highs[i] = codes_of(vi_fetch(line));
                    lows[i] = codes_of(vi_fetch(line + LINE_BYTES));
                }
                EACH(m, rows) {
                    const signed4 a = ROW_CODES(x, m, stride, 4 * k);
                    EACH(i, held) high[m][first + i] = dot(high[m][first + i], highs[i], a);
                    EACH(i, held) mixed[m][first + i] = dot(mixed[m][first + i], lows[i], a);
                    const signed4 b = ROW_CODES(x, m, stride, low + 4 * k);
                    EACH(i, held) mixed[m][first + i] = dot(mixed[m][first + i], highs[i], b);
                }
            }
        }
        w += ae_whole_part_bytes(AE_Q16);
        NEXT_ROWS(x, rows, 32);
    }
    EACH(v, PANEL_VECTORS) {
        float *out = t->out + v * W;
        const int64_t exist = t->columns - v * W;
        if (exist <= 0) continue;
        const vf d = vf_load((const float *)t->w + v * W);
        EACH(m, rows) {
            const vf sum = vf_fma(vi_to_vf(high[m][v]), vf_set(AE_HIGH), vi_to_vf(mixed[m][v]));
            const vf y = vf_mul(sum, vf_mul(d, vf_set(AE_HIGH * t->rows[m].scale)));
            vf_store_n(out + m * t->out_stride, y, exist < W ? (int)exist : W);
        }
    }
}

#define TILE(rows) \
    static void whole16_##rows(const whole_call *t) { whole16_run(t, rows); }
#define TILE_ENTRY(rows) whole16_##rows,

UP_TO(TILE_ROWS, TILE)
/* By rows - 1. */
static const whole_fn whole16_tiles[TILE_ROWS] = {UP_TO(TILE_ROWS, TILE_ENTRY)};

/* See impl_linear.h. */
static void whole16_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                          int64_t stride, int64_t columns, const ae_thread *thread) {
    whole_call t = whole_begin(l, row, rows, panel, out, stride, columns, thread);
    for (; panels; panels--) {
        whole_fetch(l, &t, 1, panels);
        whole_piece(t, rows, whole16_tiles, TILE_ROWS);
        whole_next(l, &t, 1);
    }
}

#undef TILE_ROWS
#undef TILE
#undef TILE_ENTRY
