/* Linear layers with bf16 weights on tile registers (amx.h).
 *
 * A block of 32 rows times a panel of 32 columns is two by two tiles of sums, to which every step of 32 k
 * adds two tiles of x times two of weights: 64 bytes of each row, and 2 KiB of the panel, which already
 * lies as the processor wants it. x is rounded to bf16 and laid out step by step, so that a tile of it is
 * read front to back: rows that are a power of two apart would compete for few places in the L1 cache.
 *
 * TDPBF16PS (Intel's manual, volume 2) adds the even k of a step in one chain of fused multiply-adds from
 * zero and the odd ones in another, then one to the other, and that to the sum; denormals count as zeros.
 * This is not what VDPBF16PS does, so all batches take this way, and blocks of k are whole steps: results
 * are bitwise the same for a row alone and in a batch. Few rows should not lose by it: a step of them
 * waits 52 cycles for its two sums (Intel's optimization manual) and takes 2 KiB of weights, which is more
 * than memory gives a core.
 */
#pragma once
#include "amx.h"
#include "cpu.h"
#include "linear.h"
#include "simd.h"

#define STEP_K 32
#define STEP_BYTES (STEP_K * AE_PANEL * 2) /* of a panel */
#define BLOCK_ROWS (2 * TILE_ROWS_MAX)

/* Blocks of k where blocks of rows share them in the L1 cache; in large batches it holds the next one too. */
#define BLOCK_K 512
#define LARGE_BLOCK_K 256
/* What of x a thread converts at a time fits half of its scratch. */
#define CONVERTED_BYTES ((int64_t)(AE_SCRATCH / 2))

typedef struct amx_block {
    const char *x; /* [steps][height][64 bytes], at the first row */
    int64_t height;
    const char *w; /* the panel at the first step */
    const char *last; /* [STEP_BYTES] in place of the panel's at step `whole`, where it ends within one */
    int64_t steps, whole;
    float *out;
    int64_t out_stride;
    int64_t rows, columns; /* that exist */
    int resume;            /* sums continue from `out` */
    ae_fetch *fetch;
    int64_t every; /* bytes of weights after which it is asked for more: other blocks read the same ones */
} amx_block;

/* Copies what exists of a block. */
AE_INLINE void copy_rows(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t rows,
                         int64_t columns) {
    for (int64_t r = 0; r < rows; r++, to += to_stride, from += from_stride)
        for (int64_t c = 0; c < columns; c += W) {
            const int n = columns - c < W ? (int)(columns - c) : W;
            vf_store_n(to + c, vf_load_n(from + c, n), n);
        }
}

/* Tiles 0 to 3 are the sums: top left, top right, bottom left, bottom right; 4 and 5 are x, 6 and 7 weights.
 * `height`: rows that are computed, of which t->rows exist. */
AE_INLINE void amx_run(const amx_block *t, const int64_t height, const int bottom) {
    float spare[BLOCK_ROWS * AE_PANEL] __attribute__((aligned(64)));
    const int64_t columns = t->columns < AE_PANEL ? t->columns : AE_PANEL;
    const int direct = columns == AE_PANEL && t->rows == height;
    float *out = direct ? t->out : spare;
    const int64_t stride = direct ? t->out_stride : AE_PANEL, half = AE_PANEL / 2;
    float *const below = out + TILE_ROWS_MAX * stride;
    if (t->resume) {
        if (!direct) copy_rows(spare, AE_PANEL, t->out, t->out_stride, t->rows, columns);
        TILE_LOAD(0, out, stride * 4);
        TILE_LOAD(1, out + half, stride * 4);
        if (bottom) {
            TILE_LOAD(2, below, stride * 4);
            TILE_LOAD(3, below + half, stride * 4);
        }
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (bottom) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    }
    const char *x = t->x, *w = t->w;
    const int64_t x_bytes = t->height * TILE_ROW_BYTES;
    int64_t unread = 0;
    for (int64_t s = 0; s < t->steps; s++, x += x_bytes, w += STEP_BYTES) {
        ae_ahead ahead = {0};
        for (unread -= STEP_BYTES; unread < 0; unread += t->every) {
            while (ahead.left) ae_fetch_part(&ahead);
            ahead = ae_fetch_take(t->fetch);
        }
        if (s == t->whole) w = t->last;
        TILE_LOAD(6, w, AE_PANEL * 4);
        TILE_LOAD(4, x, TILE_ROW_BYTES);
        TILE_DOT_BF16(0, 4, 6);
        for (int i = 0; i < 4; i++) ae_fetch_part(&ahead);
        TILE_LOAD(7, w + TILE_ROW_BYTES, AE_PANEL * 4);
        TILE_DOT_BF16(1, 4, 7);
        if (bottom) {
            TILE_LOAD(5, x + TILE_ROWS_MAX * TILE_ROW_BYTES, TILE_ROW_BYTES);
            TILE_DOT_BF16(2, 5, 6);
        }
        for (int i = 0; i < 4; i++) ae_fetch_part(&ahead);
        if (bottom) TILE_DOT_BF16(3, 5, 7);
    }
    TILE_STORE(0, out, stride * 4);
    TILE_STORE(1, out + half, stride * 4);
    if (bottom) {
        TILE_STORE(2, below, stride * 4);
        TILE_STORE(3, below + half, stride * 4);
    }
    if (!direct) copy_rows(t->out, t->out_stride, spare, AE_PANEL, t->rows, columns);
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
    const int64_t blocks = (c->height + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t bytes = ae_panel_bytes(k, AE_BF16, 0, 0);
    amx_block t = {.height = c->height,
                   .w = c->weight + panel * ae_panel_bytes(c->l->k, AE_BF16, 0, 0) + start * AE_PANEL * 2,
                   .last = last,
                   .steps = (k + STEP_K - 1) / STEP_K,
                   .whole = k / STEP_K,
                   .out_stride = c->stride,
                   .columns = c->columns - panel * AE_PANEL,
                   .resume = start > 0,
                   .fetch = c->fetch,
                   .every = FETCH_EVERY * blocks};
    if (t.whole < t.steps) { /* the panel ends here; zeros, as x has them */
        const int64_t whole = t.whole * STEP_BYTES;
        memcpy(last, t.w + whole, (size_t)(bytes - whole));
        memset(last + bytes - whole, 0, (size_t)(whole + STEP_BYTES - bytes));
    }
    ae_fetch_allow(c->fetch, bytes);
    for (int64_t row = 0; row < c->rows; row += BLOCK_ROWS) {
        const int64_t height = c->height - row < BLOCK_ROWS ? c->height - row : BLOCK_ROWS;
        t.x = c->converted + ((start - c->start) * c->height / STEP_K + row) * TILE_ROW_BYTES;
        t.out = c->out + row * c->stride + panel * AE_PANEL;
        t.rows = c->rows - row < height ? c->rows - row : height;
        if (height > TILE_ROWS_MAX)
            amx_run(&t, height, 1);
        else
            amx_run(&t, height, 0);
    }
}

/* The tiles of blocks of rows: as high as a single block, full where there are several. */
static void configure_tiles(int64_t rows) {
    const int64_t top = rows < TILE_ROWS_MAX ? rows : TILE_ROWS_MAX;
    const int64_t bottom = rows < BLOCK_ROWS ? rows - top : TILE_ROWS_MAX;
    const int64_t rows_of[8] = {top, top, bottom, bottom, top, bottom, TILE_ROWS_MAX, TILE_ROWS_MAX};
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)rows_of[i];
        config.row_bytes[i] = rows_of[i] ? TILE_ROW_BYTES : 0;
    }
    TILE_CONFIGURE(&config);
}

/* For bf16 weights; see impl_linear.h. */
static void tiled_chunk(const linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                        float *out, int64_t stride, int64_t columns, const ae_thread *thread) {
    const int64_t k = l->k, panel_bytes = ae_panel_bytes(k, AE_BF16, 0, 0);
    const int64_t full = (rows + TILE_ROWS_MAX - 1) / TILE_ROWS_MAX * TILE_ROWS_MAX;
    amx_chunk c = {.l = l,
                   .x = (const float *)l->x + row * k,
                   .weight = l->weight + panel * panel_bytes,
                   .converted = thread->scratch,
                   .rows = rows,
                   .height = rows <= BLOCK_ROWS ? rows : full,
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
                ae_fetch_begin(thread->fetch, w, bytes, ae_region_of(next, next ? bytes : 0));
                amx_piece(&c, start, length, p);
            }
        }
    }
    TILE_RELEASE();
}

#undef STEP_K
#undef STEP_BYTES
#undef BLOCK_ROWS
#undef BLOCK_K
#undef LARGE_BLOCK_K
#undef CONVERTED_BYTES
