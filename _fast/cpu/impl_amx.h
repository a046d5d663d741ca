/* Linear layers with bf16 weights on tile registers (impl_amx_block.h): a step is 32 k.
 *
 * x is rounded to bf16 and laid out step by step, so that a tile of it is read front to back: rows that are a
 * power of two apart would compete for few places in the L1 cache.
 *
 * TDPBF16PS (Intel's manual, volume 2) adds the even k of a step in one chain of fused multiply-adds from
 * zero and the odd ones in another, then one to the other, and that to the sum; denormals count as zeros.
 * This is not what VDPBF16PS does, so all batches take this way, and blocks of k are whole steps: results
 * are bitwise the same for a row alone and in a batch. Few rows should not lose by it: a step of them waits
 * 52 cycles for its two sums and takes 2 KiB of weights, which is more than memory gives a core.
 */
#pragma once
#include "cpu.h"
#include "impl_amx_block.h"
#include "linear.h"
#include "simd.h"

#define STEP_K 32

/* Blocks of k where blocks of rows share them in the L1 cache; in large batches it holds the next one too. */
#define BLOCK_K 512
#define LARGE_BLOCK_K 256
/* What of x a thread converts at a time fits half of its scratch. */
#define CONVERTED_BYTES ((int64_t)(AE_SCRATCH / 2))

/* Copies what exists of a block. */
AE_INLINE void copy_rows(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t rows,
                         int64_t columns) {
    for (int64_t r = 0; r < rows; r++, to += to_stride, from += from_stride)
        for (int64_t c = 0; c < columns; c += W) {
            const int n = columns - c < W ? (int)(columns - c) : W;
            vf_store_n(to + c, vf_load_n(from + c, n), n);
        }
}

/* A chunk cut into blocks of k. */
typedef struct amx_chunk {
    const linear *l;
    const float *x; /* its first row */
    const char *weight;
    char *converted; /* x from `start` on; rows past those that exist hold anything: no other row sees it */
    int64_t rows, height, start;
    float *out;
    int64_t stride, columns;
    ae_fetch *fetch;
} amx_chunk;

/* Columns [start, start + k) of x in bf16, whole steps, the last one filled with zeros. */
static void convert_block(amx_chunk *c, int64_t start, int64_t k) {
    c->start = start;
    for (int64_t r = 0; r < c->rows; r++) {
        const float *x = c->x + r * c->l->k + start;
        char *to = c->converted + r * TILE_ROW_BYTES;
        for (int64_t i = 0; i < k; i += STEP_K, to += c->height * TILE_ROW_BYTES)
            for (int64_t j = 0; j < STEP_K; j += W) {
                const int64_t left = k - i - j;
                uint16_t *lanes = (uint16_t *)to + j;
                const int n = left >= W ? W : left > 0 ? (int)left : 0;
                vf_store_bf16(lanes, n == W ? vf_load(x + i + j) : vf_load_n(x + i + j, n));
            }
    }
}

/* A block of k of a panel times all rows. */
static void amx_piece(const amx_chunk *c, int64_t start, int64_t k, int64_t panel) {
    char last[STEP_BYTES] __attribute__((aligned(64)));
    float spare[BLOCK_ROWS * AE_PANEL] __attribute__((aligned(64)));
    const int64_t left = c->columns - panel * AE_PANEL, columns = left < AE_PANEL ? left : AE_PANEL;
    const int64_t bytes = ae_panel_bytes(k, AE_BF16, 0, 0);
    amx_block b = {.x_step = c->height * TILE_ROW_BYTES,
                   .x_row = TILE_ROW_BYTES,
                   .w = c->weight + panel * ae_panel_bytes(c->l->k, AE_BF16, 0, 0) + start * AE_PANEL * 2,
                   .last = last,
                   .steps = (k + STEP_K - 1) / STEP_K,
                   .whole = k / STEP_K,
                   .resume = start > 0,
                   .fetch = c->fetch,
                   .every = FETCH_EVERY * ((c->height + BLOCK_ROWS - 1) / BLOCK_ROWS)};
    /* Where the panel ends within a step, x has zeros too. */
    if (b.whole < b.steps) fill_last(last, b.w + b.whole * STEP_BYTES, bytes - b.whole * STEP_BYTES);
    ae_fetch_allow(c->fetch, bytes);
    for (int64_t row = 0; row < c->rows; row += BLOCK_ROWS) {
        const int64_t height = c->height - row < BLOCK_ROWS ? c->height - row : BLOCK_ROWS;
        const int64_t exist = c->rows - row < height ? c->rows - row : height;
        const int direct = columns == AE_PANEL && exist == height;
        float *out = c->out + row * c->stride + panel * AE_PANEL;
        b.x = c->converted + ((start - c->start) * c->height / STEP_K + row) * TILE_ROW_BYTES;
        b.sums = direct ? out : spare;
        b.sums_row = (direct ? c->stride : AE_PANEL) * 4;
        if (!direct && b.resume) copy_rows(spare, AE_PANEL, out, c->stride, exist, columns);
        if (height > TILE_ROWS_MAX)
            amx_multiply(&b, 1, 0);
        else
            amx_multiply(&b, 0, 0);
        if (!direct) copy_rows(out, c->stride, spare, AE_PANEL, exist, columns);
    }
}

/* For bf16 weights; see impl_linear.h. */
static void tiled_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                        float *out, int64_t stride, int64_t columns, const ae_thread *thread) {
    const int64_t k = l->k, panel_bytes = ae_panel_bytes(k, AE_BF16, 0, 0);
    amx_chunk c = {.l = l,
                   .x = (const float *)l->x + row * k,
                   .weight = l->weight + panel * panel_bytes,
                   .converted = thread->scratch,
                   .rows = rows,
                   .height = rows_of_tiles(rows),
                   .out = out,
                   .stride = stride,
                   .columns = columns,
                   .fetch = thread->fetch};
    const int64_t fits = CONVERTED_BYTES / TILE_ROW_BYTES / c.height * STEP_K;
    int64_t most = rows <= BLOCK_ROWS ? k : is_small(l) ? BLOCK_K : LARGE_BLOCK_K;
    configure_tiles(rows);
    if (is_small(l) && k <= fits) {
        /* Panel by panel: from front to back, as they are fetched. */
        convert_block(&c, 0, k);
        for (int64_t p = 0; p < panels; p++)
            for (int64_t start = 0; start < k; start += most)
                amx_piece(&c, start, k - start < most ? k - start : most, p);
    } else {
        /* Block by block of k, so that x stays in the L2 cache; each block of a panel is fetched while
         * the one before is multiplied. */
        if (most > fits) most = fits;
        for (int64_t start = 0; start < k; start += most) {
            const int64_t length = k - start < most ? k - start : most;
            const int64_t bytes = ae_panel_bytes(length, AE_BF16, 0, 0);
            const char *w = c.weight + start * AE_PANEL * 2;
            convert_block(&c, start, length);
            for (int64_t p = 0; p < panels; p++, w += panel_bytes) {
                const char *next = p + 1 < panels      ? w + panel_bytes
                                   : start + most < k ? c.weight + (start + most) * AE_PANEL * 2
                                                      : NULL;
                ae_fetch_begin(thread->fetch, ae_block_of(w, bytes), bytes, ae_block_of(next, bytes));
                amx_piece(&c, start, length, p);
            }
        }
    }
    TILE_RELEASE();
}

#undef STEP_K
#undef BLOCK_K
#undef LARGE_BLOCK_K
#undef CONVERTED_BYTES
