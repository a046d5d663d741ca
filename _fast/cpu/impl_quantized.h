/* Products with quantized weights (quantized.h): codes times codes in integers, group by group.
 *
 * A tile is a block of columns of a panel, times some rows. Between blocks the float sums wait in `out`.
 *
 * 4-bit codes are spread to bytes by every tile anew: that is hidden behind the dot products, where a copy in
 * bytes would double what is read.
 */
#pragma once
#include "cpu.h"
#include "linear.h"
#include "quantized.h"
#include "simd_int.h"
#include "tile.h"

/* A panel of bytes, its scales and a tile's x fit the L1 cache. */
#define BLOCK_COLUMNS 768
#define BLOCK_GROUPS (BLOCK_COLUMNS / 32)

/* Rows of the largest tile, whose sums, in integers and in floats, fit the registers. */
#if defined(AE_LEVEL_AVX512VNNI)
#define TILE_ROWS 7
#elif defined(AE_LEVEL_AVX512)
#define TILE_ROWS 6
#elif defined(AE_LEVEL_NEON)
#define TILE_ROWS 3
#else
#define TILE_ROWS 2
#endif

/* Of one row in a block, by group: where its sums start (INT_BIAS less what the weights' zero adds), its
 * scale, and scale * sum, with which minima are multiplied. */
typedef struct int_row {
    int32_t start[BLOCK_GROUPS];
    float scale[BLOCK_GROUPS], scaled_sum[BLOCK_GROUPS];
} int_row;
/* How many of them fit the scratch. */
#define MAX_PREPARED ((int64_t)(AE_SCRATCH / 2 / sizeof(int_row)))

typedef struct int_tile {
    const int8_t *x;
    const int_row *rows;
    const char *w; /* group 0 of the panel */
    int64_t x_stride, group, groups;
    ae_fetch *fetch;
    int64_t every; /* bytes of weights after which it is asked for more: other tiles read the same ones */
    float *out;
    int64_t out_stride, columns; /* columns that exist */
    int minimum, resume;
} int_tile;

#define CODES(v, k) vi_fetch(line + ((k) * AE_PANEL + (v) * W) * 4)

/* Columns of vector v that exist. */
AE_INLINE int lanes(const int_tile *t, int v) {
    const int64_t exist = t->columns - v * W;
    return exist >= W ? W : exist > 0 ? (int)exist : 0;
}

AE_INLINE void int_run(const int_tile *t, const int bits, const int rows) {
    const int held = HELD(PANEL_VECTORS);
    const int64_t stride = t->x_stride;
    vf total[TILE_ROWS][PANEL_VECTORS];
    EACH(v, PANEL_VECTORS) {
        const float *out = t->out + v * W;
        const int n = t->resume ? lanes(t, v) : 0;
        if (n == 0)
            EACH(m, rows) total[m][v] = vf_zero();
        else if (n == W)
            EACH(m, rows) total[m][v] = vf_load(out + m * t->out_stride);
        else
            EACH(m, rows) total[m][v] = vf_load_n(out + m * t->out_stride, n);
    }
    const int8_t *x[] = ROW_BASES(t->x, stride);
    const int64_t group_bytes = ae_group_bytes(bits == 8 ? AE_Q8 : AE_Q4, t->group, t->minimum);
    const int64_t part_bytes = group_bytes * 32 / t->group, header = t->minimum ? 128 : 64;
    const char *w = t->w;
    ae_ahead ahead = {0};
    int64_t unread = 0;
    for (int64_t g = 0; g < t->groups; g++, w += group_bytes) {
        vi sum[TILE_ROWS][PANEL_VECTORS];
        EACH(m, rows) EACH(v, PANEL_VECTORS) sum[m][v] = vi_start(&t->rows[m].start[g]);
        const char *line = w + header;
        for (int64_t left = t->group; left; left -= 32) {
            ae_fetch_due(t->fetch, &ahead, &unread, part_bytes, t->every, rows == 1);
            if (bits == 4) {
                EACH(k, 4) {
                    if (rows > 1) ae_fetch_part(&ahead);
                    EACH_HELD(first, PANEL_VECTORS) {
                        codes low[PANEL_VECTORS], high[PANEL_VECTORS];
                        EACH(i, held) {
                            const vi both = CODES(first + i, k);
                            low[i] = codes_of_nibbles(vi_low_nibbles(both));
                            high[i] = codes_of_nibbles(vi_high_nibbles(both));
                        }
                        EACH(m, rows) {
                            const signed4 a = ROW_CODES(x, m, stride, 8 * k);
                            const signed4 b = ROW_CODES(x, m, stride, 8 * k + 4);
                            EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], low[i], a);
                            EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], high[i], b);
                        }
                    }
                }
                line += 16 * AE_PANEL;
            } else {
                EACH(k, 8) {
                    if (rows > 1) ae_fetch_part(&ahead);
                    EACH_HELD(first, PANEL_VECTORS) {
                        codes both[PANEL_VECTORS];
                        EACH(i, held) both[i] = codes_of(CODES(first + i, k));
                        EACH(m, rows) {
                            const signed4 a = ROW_CODES(x, m, stride, 4 * k);
                            EACH(i, held) sum[m][first + i] = dot(sum[m][first + i], both[i], a);
                        }
                    }
                }
                line += 32 * AE_PANEL;
            }
            NEXT_ROWS(x, rows, 32);
        }
        EACH(v, PANEL_VECTORS) {
            const vf d = vf_load_f16((const uint16_t *)w + v * W);
            const vf biased = vf_mul(d, vf_set(-INT_BIAS_FLOAT));
            EACH(m, rows) total[m][v] = add_scaled(total[m][v], sum[m][v], d, biased, &t->rows[m].scale[g]);
        }
    }
    if (t->minimum) {
        w = t->w;
        for (int64_t g = 0; g < t->groups; g++, w += group_bytes)
            EACH(v, PANEL_VECTORS) {
                const vf minima = vf_load_f16((const uint16_t *)w + AE_PANEL + v * W);
                EACH(m, rows) total[m][v] = vf_fma(minima, vf_set(t->rows[m].scaled_sum[g]), total[m][v]);
            }
    }
    EACH(v, PANEL_VECTORS) {
        float *out = t->out + v * W;
        const int n = lanes(t, v);
        if (n == W)
            EACH(m, rows) vf_store(out + m * t->out_stride, total[m][v]);
        else
            EACH(m, rows) vf_store_n(out + m * t->out_stride, total[m][v], n);
    }
}

typedef void (*int_fn)(const int_tile *);

#define TILE(rows)                                                         \
    static void int_q8_##rows(const int_tile *t) { int_run(t, 8, rows); } \
    static void int_q4_##rows(const int_tile *t) { int_run(t, 4, rows); }
#define ENTRY(rows) {int_q8_##rows, int_q4_##rows},

UP_TO(TILE_ROWS, TILE)

/* By rows - 1; 8 and 4 bits. */
static const int_fn int_tiles[TILE_ROWS][2] = {UP_TO(TILE_ROWS, ENTRY)};

static void prepare_row(int_row *out, const int8_t *row8, const linear *l, int64_t first, int64_t groups) {
    const float *scale = ae_row8_scales(row8, l->k, l->group) + first;
    const int32_t *sum = ae_row8_sums(row8, l->k, l->group) + first;
    const int32_t zero = (l->minimum ? 0 : l->type == AE_Q8 ? 128 : 8) - (l->type == AE_Q8 ? CODES_ZERO : 0);
    for (int64_t g = 0; g < groups; g++) {
        out->start[g] = INT_BIAS - zero * sum[g];
        out->scale[g] = scale[g];
        out->scaled_sum[g] = scale[g] * (float)sum[g];
    }
}

/* A block of a panel times all rows of a chunk. */
static void int_piece(int_tile t, int64_t rows, int narrow) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int_tile first = t;
    t.every = FETCH_EVERY * tiles;
    ae_fetch_allow(t.fetch, t.groups * ae_group_bytes(narrow ? AE_Q4 : AE_Q8, t.group, t.minimum));
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
        t.x = first.x + row * t.x_stride;
        t.rows = first.rows + row;
        t.out = first.out + row * t.out_stride;
        int_tiles[count - 1][narrow](&t);
    }
}

/* A chunk cut into blocks of columns; of each row and block `prepared` holds an int_row. */
typedef struct int_chunk {
    const linear *l;
    const int8_t *x;
    int_row *prepared;
    const char *weight;
    int64_t rows, panels, blocks, row_bytes, panel_bytes, group_bytes;
    float *out;
    int64_t stride, columns;
    ae_fetch *fetch;
} int_chunk;

static int64_t first_group(const int_chunk *c, int64_t block) {
    return ae_groups(c->l->k, c->l->group) * block / c->blocks;
}

static void prepare_block(const int_chunk *c, int64_t block, int_row *prepared) {
    const int64_t first = first_group(c, block), groups = first_group(c, block + 1) - first;
    for (int64_t r = 0; r < c->rows; r++)
        prepare_row(prepared + r, c->x + r * c->row_bytes, c->l, first, groups);
}

static int_tile tile_at(const int_chunk *c, int64_t block, const int_row *prepared, int64_t panel) {
    const int64_t first = first_group(c, block);
    return (int_tile){.x = c->x + first * c->l->group,
                      .rows = prepared,
                      .w = c->weight + panel * c->panel_bytes + first * c->group_bytes,
                      .x_stride = c->row_bytes,
                      .group = c->l->group,
                      .groups = first_group(c, block + 1) - first,
                      .fetch = c->fetch,
                      .out = c->out + panel * AE_PANEL,
                      .out_stride = c->stride,
                      .columns = c->columns - panel * AE_PANEL,
                      .minimum = c->l->minimum,
                      .resume = block > 0};
}

/* Panel by panel: from front to back, as they are fetched. All blocks are prepared. */
static void by_panels(const int_chunk *c) {
    for (int64_t p = 0; p < c->panels; p++)
        for (int64_t b = 0; b < c->blocks; b++)
            int_piece(tile_at(c, b, c->prepared + b * c->rows, p), c->rows, c->l->type == AE_Q4);
}

/* Block by block, so that x and what is known of it stay in the L2 cache; a piece is fetched while the one
 * before is multiplied. */
static void by_blocks(const int_chunk *c) {
    for (int64_t b = 0; b < c->blocks; b++) {
        prepare_block(c, b, c->prepared);
        for (int64_t p = 0; p < c->panels; p++) {
            const int_tile t = tile_at(c, b, c->prepared, p);
            const char *next = p + 1 < c->panels ? t.w + c->panel_bytes
                               : b + 1 < c->blocks   ? c->weight + first_group(c, b + 1) * c->group_bytes
                                                     : NULL;
            const int64_t bytes = t.groups * c->group_bytes;
            ae_fetch_begin(c->fetch, ae_block_of(t.w, bytes), bytes, ae_block_of(next, bytes));
            int_piece(t, c->rows, c->l->type == AE_Q4);
        }
    }
}

static int64_t blocks_of(const linear *l) {
    const int64_t most = BLOCK_COLUMNS / l->group;
    return (ae_groups(l->k, l->group) + most - 1) / most;
}

/* Prepares all blocks of a small batch's rows, if they fit: for all chunks of the call. */
static void prepare_quantized(linear *l, const ae_thread *thread) {
    int_chunk c = {.l = l, .x = (const int8_t *)l->x, .rows = l->m, .blocks = blocks_of(l),
                   .row_bytes = ae_row8_bytes(l->k, l->group)};
    if (c.rows * c.blocks > MAX_PREPARED) return;
    int_row *prepared = thread->scratch;
    for (int64_t b = 0; b < c.blocks; b++) prepare_block(&c, b, prepared + b * c.rows);
    l->prepared = prepared;
}

/* See impl_linear.h. */
static void quantized_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                            float *out, int64_t stride, int64_t columns, const ae_thread *thread) {
    int_chunk c = {.l = l,
                   .prepared = thread->scratch,
                   .panels = panels,
                   .blocks = blocks_of(l),
                   .row_bytes = ae_row8_bytes(l->k, l->group),
                   .panel_bytes = ae_panel_bytes(l->k, l->type, l->group, l->minimum),
                   .group_bytes = ae_group_bytes(l->type, l->group, l->minimum),
                   .stride = stride,
                   .columns = columns,
                   .fetch = thread->fetch};
    c.weight = l->weight + panel * c.panel_bytes;
    for (int64_t done = 0; done < rows; done += c.rows) {
        c.rows = rows - done < MAX_PREPARED ? rows - done : MAX_PREPARED;
        c.x = (const int8_t *)l->x + (row + done) * c.row_bytes;
        c.out = out + done * stride;
        if (l->prepared)
            by_panels(&c);
        else
            by_blocks(&c);
    }
}

#undef BLOCK_COLUMNS
#undef BLOCK_GROUPS
#undef MAX_PREPARED
#undef TILE_ROWS
#undef TILE
#undef CODES
#undef ENTRY
