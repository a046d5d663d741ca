/* A block of rows times a panel in tile registers (amx.h): what linears with bf16 and with 8-bit weights share.
 *
 * A block of 32 rows times a panel of 32 columns is two by two tiles of sums, to which every step adds two
 * tiles of x times two of weights: 64 bytes of each row, and 2 KiB of the panel, which already lies as the
 * processor wants it. The cycles here are of Intel's optimization manual: a product of tiles takes 16, whatever
 * their rows, and the next one to the same sums waits 52.
 */
#pragma once
#include "amx.h"
#include "cpu.h"
#include "pack.h"

#define STEP_BYTES (TILE_ROW_BYTES * AE_PANEL) /* of a panel */
#define BLOCK_ROWS (2 * TILE_ROWS_MAX)

typedef struct amx_block {
    const char *x;         /* the block's first row at the first step */
    int64_t x_step, x_row; /* bytes from a step of it, and from a row, to the next */
    const char *w;         /* the panel at the first step */
    const char *last;      /* [STEP_BYTES] in place of the panel's at step `whole`, where it ends within one */
    int64_t steps, whole;
    void *sums;       /* [rows][AE_PANEL] float32 or int32 */
    int64_t sums_row; /* bytes from a row of them to the next */
    int resume;       /* they continue from what is there */
    ae_fetch *fetch;
    int64_t every; /* bytes of weights after which it is asked for more: other blocks read the same ones */
} amx_block;

/* Tiles 0 to 3 are the sums: top left, top right, bottom left, bottom right; 4 and 5 are x, 6 and 7 weights.
 * `bottom`: there are rows for the bottom ones; `int8`: of bytes, not of bf16. */
AE_INLINE void amx_multiply(const amx_block *t, const int bottom, const int int8) {
    char *const right = (char *)t->sums + TILE_ROW_BYTES;
    char *const below = (char *)t->sums + TILE_ROWS_MAX * t->sums_row;
    if (t->resume) {
        TILE_LOAD(0, t->sums, t->sums_row);
        TILE_LOAD(1, right, t->sums_row);
        if (bottom) {
            TILE_LOAD(2, below, t->sums_row);
            TILE_LOAD(3, below + TILE_ROW_BYTES, t->sums_row);
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
    const int64_t x_row = t->x_row;
    ae_ahead ahead = {0};
    int64_t unread = 0;
    for (int64_t s = 0; s < t->steps; s++, x += t->x_step, w += STEP_BYTES) {
        ae_fetch_due(t->fetch, &ahead, &unread, STEP_BYTES, t->every, 0);
        if (s == t->whole) w = t->last;
        TILE_LOAD(6, w, 2 * TILE_ROW_BYTES);
        TILE_LOAD(4, x, x_row);
        TILE_DOT(int8, 0, 4, 6);
        for (int i = 0; i < 4; i++) ae_fetch_part(&ahead);
        TILE_LOAD(7, w + TILE_ROW_BYTES, 2 * TILE_ROW_BYTES);
        TILE_DOT(int8, 1, 4, 7);
        if (bottom) {
            TILE_LOAD(5, x + TILE_ROWS_MAX * x_row, x_row);
            TILE_DOT(int8, 2, 5, 6);
        }
        for (int i = 0; i < 4; i++) ae_fetch_part(&ahead);
        if (bottom) TILE_DOT(int8, 3, 5, 7);
    }
    TILE_STORE(0, t->sums, t->sums_row);
    TILE_STORE(1, right, t->sums_row);
    if (bottom) {
        TILE_STORE(2, below, t->sums_row);
        TILE_STORE(3, below + TILE_ROW_BYTES, t->sums_row);
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

/* Rows that are computed: those of a single block, whole tiles where there are several blocks. */
static int64_t rows_of_tiles(int64_t rows) {
    return rows <= BLOCK_ROWS ? rows : (rows + TILE_ROWS_MAX - 1) / TILE_ROWS_MAX * TILE_ROWS_MAX;
}

/* The end of a panel, filled with zeros to a step. */
static void fill_last(char *last, const char *w, int64_t bytes) {
    memcpy(last, w, (size_t)bytes);
    memset(last + bytes, 0, (size_t)(STEP_BYTES - bytes));
}
