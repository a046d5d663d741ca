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
 * Compact weights (compact.h) become bf16 on their way: results are those of plain ones, to the bit.
 * At level amx plain bf16 weights do not come here (impl_amx.h), and compact ones are multiplied as float32.
 */
#pragma once
#include "compact.h"
#include "cpu.h"
#include "impl_quantize.h"
#include "linear.h"
#include "simd_int.h"
#include "tile.h"

/* Rows of the largest tile that fits the registers. Blocks of k for batches of several tiles: of small ones they
 * share a block of a panel in the L1 cache, and the fewer rows a tile has, the more often it is read; of large ones
 * the next block is fetched meanwhile. */
#if defined(AE_LEVEL_AVX512)
#define TILE_ROWS 12
#define BLOCK_K 896
#define LARGE_BLOCK_K 2048
#else
#if defined(AE_LEVEL_AVX2) || defined(AE_LEVEL_NEON)
#define TILE_ROWS 3
#else
#define TILE_ROWS 2
#endif
#define BLOCK_K 512
#define LARGE_BLOCK_K 256
#endif

/* Bytes of a number of x that bf16 weights multiply. */
#if defined(BF16_DOT)
#define X_BYTES 2
#else
#define X_BYTES 4
#endif

enum { COMPACT = AE_F16 + 1 };

/* Some k of a panel. */
typedef struct block {
    const char *w; /* its weights; of a compact panel the units */
    int64_t k, bytes;
    int type; /* enum ae_dtype of plain weights, or COMPACT, and then: */
    int32_t unit;             /* which of the panel's units comes first, */
    const int32_t *exception; /* the first exception that is not before it, and what that is, */
    const char *plain;
    const uint8_t *upper; /* and the panel's table */
} block;

/* Where a tile has few rows, several share a compact block that was spread to bf16 once, at the end of the thread's
 * scratch; else each does that on its way, which its products hide. */
#if TILE_ROWS < 12
#define SPREADS
#define SPREAD_BYTES (BLOCK_K * AE_PANEL * 2)
#endif

typedef struct tile {
    const char *x;    /* row 0 at the first k of this block; bf16 in the dot-product kernels */
    int64_t x_stride; /* bytes */
    const block *block;
    float *out;
    int64_t out_stride;
    int64_t columns; /* that exist */
    int resume;      /* sums continue from `out` */
    ae_fetch *fetch;
    int64_t every;   /* bytes of weights after which it is asked for more: other tiles read the same ones */
    int64_t stretch; /* k after which it is looked whether that is due */
} tile;

/* `stretch` of a batch of one tile. */
#define STRETCH 16

/* Vector i of the first half of the columns, and of the second, of a pair of k of a unit. */
typedef struct halves {
    vi first, second;
} halves;

AE_INLINE halves compact_halves(const char *unit, vi upper, int pair, int i) {
    const vi lower = vi_load(unit + pair * 64 + i * W * 4), both = vi_load(unit + 128 + i * W * 4);
    const vi bytes = vi_choose(upper, pair ? vi_high_nibbles(both) : vi_low_nibbles(both));
    return (halves){vi_zip_low(lower, bytes), vi_zip_high(lower, bytes)};
}

AE_INLINE halves plain_halves(const char *unit, int pair, int i) {
    unit += pair * AE_PANEL * 4 + i * W * 4;
    return (halves){vi_load(unit), vi_load(unit + AE_PANEL * 2)};
}

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
    const block *const read = t->block;
    const char *w = read->w;
    const int64_t stride = t->x_stride;
    const char *x[] = ROW_BASES(t->x, stride);
    const int64_t stretch_bytes = type == COMPACT ? t->stretch / AE_COMPACT_K * AE_COMPACT_UNIT
                                                  : t->stretch * AE_PANEL * (type == AE_F32 ? 4 : 2);
    const vi upper = type == COMPACT ? vi_table(read->upper) : (vi){0};
    const int32_t *next = read->exception;
    uintptr_t exception = type == COMPACT ? (uintptr_t)w + (uintptr_t)(*next - read->unit) * AE_COMPACT_UNIT : 0;
    const char *plain = read->plain;
    ae_ahead ahead = {0};
    int64_t unread = 0;
    for (int64_t left = read->k; left > 0;) {
        ae_fetch_due(t->fetch, &ahead, &unread, stretch_bytes, t->every,
                     rows == 1 || (type != AE_BF16 && type != COMPACT));
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
        if (type == COMPACT) {
            for (; k >= AE_COMPACT_K; k -= AE_COMPACT_K, w += AE_COMPACT_UNIT) {
                const int is_exception = (uintptr_t)w == exception;
                EACH(pair, 2) {
                    if (rows > 1) ae_fetch_part(&ahead);
                    EACH(i, PANEL_VECTORS / 2) {
                        const halves b = __builtin_expect(is_exception, 0) ? plain_halves(plain, pair, i)
                                                                          : compact_halves(w, upper, pair, i);
                        enum { SECOND = PANEL_VECTORS / 2 };
#if defined(BF16_DOT)
                        EACH(m, rows) {
                            const bf16_pair a = bf16_pair_of(*(const int32_t *)(ROW(x, m, stride) + 4 * pair));
                            sum[m][i] = bf16_dot(sum[m][i], a, b.first);
                            sum[m][SECOND + i] = bf16_dot(sum[m][SECOND + i], a, b.second);
                        }
#else
                        EACH(odd, 2) {
                            const vf c = odd ? vi_high_bf16(b.first) : vi_low_bf16(b.first);
                            const vf d = odd ? vi_high_bf16(b.second) : vi_low_bf16(b.second);
                            EACH(m, rows) {
                                const vs a = vs_load((const float *)ROW(x, m, stride) + 2 * pair + odd);
                                sum[m][i] = vs_fma(a, c, sum[m][i]);
                                sum[m][SECOND + i] = vs_fma(a, d, sum[m][SECOND + i]);
                            }
                        }
#endif
                    }
                }
                if (is_exception) {
                    plain += AE_COMPACT_EXCEPTION;
                    exception = (uintptr_t)read->w + (uintptr_t)(*++next - read->unit) * AE_COMPACT_UNIT;
                }
                NEXT_ROWS(x, rows, AE_COMPACT_K * X_BYTES);
            }
            if (k > 0) w = plain; /* what is left of the last unit */
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
    static void tile_f16_##rows(const tile *t) { tile_run(t, AE_F16, rows); }   \
    static void tile_compact_##rows(const tile *t) { tile_run(t, COMPACT, rows); }
#define ENTRY(rows) {tile_f32_##rows, tile_bf16_##rows, tile_f16_##rows, tile_compact_##rows},

UP_TO(TILE_ROWS, TILE)

/* By rows - 1 and weight type. */
static const tile_fn tiles_of[TILE_ROWS][4] = {UP_TO(TILE_ROWS, ENTRY)};

#if defined(BF16_DOT)
/* x [rows, k] as bf16, an odd k padded with a zero; `stride` in elements. */
static void to_bf16(uint16_t *out, int64_t stride, const float *x, int64_t x_stride, int64_t rows,
                    int64_t k) {
    for (int64_t m = 0; m < rows; m++) round_run(out + m * stride, x + m * x_stride, k);
}
#endif

#if defined(SPREADS)
/* A compact block as plain bf16. */
static block plain_block(const block *b, char *to) {
    const block plain = {.w = to, .k = b->k, .type = AE_BF16};
    const vi upper = vi_table(b->upper);
    const int32_t *exception = b->exception;
    const char *from = b->plain, *w = b->w;
    int32_t unit = b->unit;
    int64_t k = b->k;
    for (; k >= AE_COMPACT_K; k -= AE_COMPACT_K, unit++, w += AE_COMPACT_UNIT, to += AE_COMPACT_EXCEPTION) {
        EACH(pair, 2) EACH(i, PANEL_VECTORS / 2) {
            const halves b = compact_halves(w, upper, pair, i);
            vi_store(to + (pair * PANEL_VECTORS + i) * W * 4, b.first);
            vi_store(to + (pair * PANEL_VECTORS + PANEL_VECTORS / 2 + i) * W * 4, b.second);
        }
        if (unit == *exception) {
            memcpy(to, from, AE_COMPACT_EXCEPTION);
            from += AE_COMPACT_EXCEPTION;
            exception++;
        }
    }
    if (k > 0) memcpy(to, from, AE_COMPACT_EXCEPTION);
    return plain;
}
#endif

/* All rows times a block of a panel; `t` is the tile of all of them. */
static void float_piece(tile t, const block *b, int64_t rows, const ae_thread *thread) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const char *x = t.x;
    float *out = t.out;
    ae_fetch_allow(thread->fetch, b->bytes);
    t.every = FETCH_EVERY * tiles;
#if defined(SPREADS)
    block plain;
    if (b->type == COMPACT && tiles > 1) {
        t.every = t.every * AE_COMPACT_EXCEPTION / AE_COMPACT_UNIT;
        plain = plain_block(b, (char *)thread->scratch + AE_SCRATCH - SPREAD_BYTES);
        b = &plain;
    }
#endif
    t.block = b;
    t.stretch = STRETCH * tiles;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = rows * i / tiles, n = rows * (i + 1) / tiles - first;
        t.x = x + first * t.x_stride;
        t.out = out + first * t.out_stride;
        tiles_of[n - 1][b->type](&t);
    }
}

/* A length of blocks that k comes in equal ones of, of at most `most`. Units of compact weights are not parted. */
static int64_t block_length(int64_t k, int64_t most) {
    const int64_t blocks = (k + most - 1) / most;
    return ((k + blocks - 1) / blocks + 3) & ~(int64_t)3;
}

/* The block of k from `start` on of a panel. */
static block block_of(const linear *l, int64_t panel, int64_t start, int64_t most) {
    block b = {.w = panel_at(l, panel), .k = l->k - start < most ? l->k - start : most, .type = l->type};
    if (l->compact) {
        const ae_compact_panel *p = (const ae_compact_panel *)b.w;
        b.w = ae_compact_units(p);
        if (p->count >= 0) {
            b.type = COMPACT;
            b.unit = (int32_t)(start / AE_COMPACT_K);
            b.w += b.unit * AE_COMPACT_UNIT;
            b.bytes = b.k / AE_COMPACT_K * AE_COMPACT_UNIT;
            b.upper = p->upper;
            b.exception = p->exception;
            b.plain = ae_compact_exceptions(p);
            for (; *b.exception < b.unit; b.exception++) b.plain += AE_COMPACT_EXCEPTION;
            return b;
        }
    }
    b.w += ae_panel_bytes(start, l->type, 0, 0);
    b.bytes = ae_panel_bytes(b.k, l->type, 0, 0);
    return b;
}

/* What lies before the first block of a panel is fetched at once: it is read out of turn. */
static void fetch_exceptions(const linear *l, int64_t panel, ae_fetch *fetch) {
    if (!l->compact) return;
    const char *start = panel_at(l, panel), *units = ae_compact_units((const ae_compact_panel *)start);
    ae_fetch_allow(fetch, units - start);
    for (; start < units; start += 64) __builtin_prefetch(start);
}

/* What of x a thread converts at a time fits half of its scratch. */
#define CONVERTED_BYTES ((int64_t)(AE_SCRATCH / 2))

/* See impl_linear.h. */
static void float_chunk(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                        int64_t stride, int64_t columns, const ae_thread *thread) {
    const int64_t k = l->k;
    int64_t x_bytes = 4;
    int64_t most = rows <= TILE_ROWS ? k : block_length(k, is_small(l) ? BLOCK_K : LARGE_BLOCK_K);
    tile all = {.x = l->x + row * k * 4,
                .x_stride = k * 4,
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
        for (int64_t p = 0; p < panels; p++, all.out += AE_PANEL, all.columns -= AE_PANEL) {
            fetch_exceptions(l, panel + p, thread->fetch);
            for (int64_t start = 0; start < k; start += most) {
                const block b = block_of(l, panel + p, start, most);
                tile t = all;
                t.x += start * x_bytes;
                t.resume = start > 0;
                float_piece(t, &b, rows, thread);
            }
        }
        return;
    }
    for (int64_t start = 0; start < k; start += most) {
        block b = block_of(l, panel, start, most), next = {0};
        for (int64_t p = 0; p < panels; p++, b = next) {
            tile t = all;
            t.x += start * x_bytes;
            t.resume = start > 0;
            t.out += p * AE_PANEL;
            t.columns -= p * AE_PANEL;
#if defined(BF16_DOT)
            if (convert && !whole) {
                t.x_stride = ((b.k + 1) & ~(int64_t)1) * 2;
                t.x = thread->scratch;
                if (p == 0)
                    to_bf16(thread->scratch, t.x_stride / 2, (const float *)all.x + start, k, rows, b.k);
            }
#endif
            /* Each block of a panel is fetched while the one before is multiplied. */
            next = p + 1 < panels      ? block_of(l, panel + p + 1, start, most)
                   : start + most < k ? block_of(l, panel, start + most, most)
                                      : (block){0};
            ae_fetch_begin(thread->fetch, ae_block_of(b.w, b.bytes), b.bytes, ae_block_of(next.w, next.bytes));
            float_piece(t, &b, rows, thread);
        }
    }
}

#undef CONVERTED_BYTES
#undef TILE_ROWS
#undef BLOCK_K
#undef LARGE_BLOCK_K
#undef X_BYTES
#undef SPREADS
#undef SPREAD_BYTES
#undef STRETCH
#undef TILE
#undef ENTRY
