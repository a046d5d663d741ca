/* Linear layers with weights of whole rows on tile registers (impl_amx_block.h): a step is 64 k. Sums are
 * integers, and wrap as those of impl_whole.h do: outputs are the same to the bit. 4-bit codes are spread first.
 *
 * Codes of x are read where they lie. Their rows are whole lines of the cache, an odd number of them where K is
 * a multiple of 128, so that they do not compete for places in the L1 cache; to lay out 96 of them for an item
 * of four panels would take a fifth of its products' time. So
 *     - where K ends within a step, zeros stand in for weights: what lies behind a row's codes does not matter;
 *     - the last of several blocks, whose tiles are full, reaches back into rows of the one before.
 */
#pragma once
#include "cpu.h"
#include "impl_amx_block.h"
#include "impl_whole.h"
#include "linear.h"

/* Rows of a batch that impl_whole.h does better. A step of a panel takes it 16 cycles a row, two products at a
 * time; tiles of up to 16 rows wait 52 for their two sums, and for each panel once to zero and store them. */
#define VNNI_ROWS 4
/* Steps of a panel that stay in the L1 cache, with x of a block and what is fetched of the next steps, while
 * blocks share them. */
#define SHARED_STEPS 8

/* A panel times all rows of a chunk. `sums`: [rows of tiles][AE_PANEL]. */
static void tiled_whole_panel(const whole_call *t, int64_t rows, int32_t *sums) {
    char last[STEP_BYTES] __attribute__((aligned(64)));
    const int64_t computed = rows_of_tiles(rows), back = computed - rows;
    const int64_t last_block = (rows - 1) / BLOCK_ROWS * BLOCK_ROWS;
    const int64_t whole = t->k / TILE_ROW_BYTES, steps = (t->k + TILE_ROW_BYTES - 1) / TILE_ROW_BYTES;
    const int64_t most = rows <= BLOCK_ROWS ? steps : SHARED_STEPS;
    const char *w = t->w + AE_WHOLE_SCALES;
    if (whole < steps) fill_last(last, w + whole * STEP_BYTES, t->k * AE_PANEL - whole * STEP_BYTES);
    for (int64_t start = 0; start < steps; start += most)
        for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
            const int64_t first = row < last_block ? row : row - back;
            const amx_block b = {
                .x = (const char *)t->x + first * t->x_stride + start * TILE_ROW_BYTES,
                .x_step = TILE_ROW_BYTES,
                .x_row = t->x_stride,
                .w = w + start * STEP_BYTES,
                .last = last,
                .steps = steps - start < most ? steps - start : most,
                .whole = whole - start,
                .sums = sums + row * AE_PANEL,
                .sums_row = 4 * AE_PANEL,
                .resume = start > 0,
                .fetch = t->fetch,
                .every = t->every,
            };
            if (computed - row > TILE_ROWS_MAX)
                amx_multiply(&b, 1, 1);
            else
                amx_multiply(&b, 0, 1);
        }
    for (int64_t c = 0; c < AE_PANEL && c < t->columns; c += W) {
        const vf d = vf_load((const float *)t->w + c);
        for (int64_t r = 0; r < rows; r++) {
            const int32_t *sum = sums + (r < last_block ? r : r + back) * AE_PANEL + c;
            whole_store(t->out + r * t->out_stride + c, vi_add(vi_load(sum), vi_set(t->rows[r].start)), d,
                        t->rows[r].scale, t->columns - c);
        }
    }
}

/* See impl_linear.h. */
static void tiled_whole_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                              float *out, int64_t stride, int64_t columns, const ae_thread *thread) {
    whole_call t = whole_begin(l, row, rows, panel, out, stride, columns, thread);
    int32_t *sums = (int32_t *)((char *)thread->scratch + GROUP_ROWS * sizeof(whole_row));
    configure_tiles(rows);
    for (; panels; panels--) {
        whole_fetch(l, &t, 1, panels);
        whole_call now = l->type == AE_Q4 ? spread(t, 1, thread) : t;
        now.every *= (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        tiled_whole_panel(&now, rows, sums);
        whole_next(l, &t, 1);
    }
    TILE_RELEASE();
}

#undef SHARED_STEPS
