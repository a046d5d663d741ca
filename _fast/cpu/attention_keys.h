/* Keys and values of a tile of positions, from the paged cache into a thread's scratch. */
#pragma once
#include "attention.h"
#include "simd_int.h"
#include "typed.h"

#if W == 16
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif W == 8
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif

#if defined(__clang__)
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc has that one since version 12 only */
typedef int32_t lane_numbers __attribute__((vector_size(4 * W)));
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (lane_numbers){__VA_ARGS__})
#endif

/* Transposes W vectors: interleaving the two halves log2(W) times. */
AE_INLINE void transpose(vf *a) {
    vf b[W];
#pragma GCC unroll 4
    for (int stage = 1; stage < W; stage *= 2) {
        EACH(i, W / 2) {
            b[2 * i] = ZIP(a[i], a[i + W / 2], ZIP_LOW);
            b[2 * i + 1] = ZIP(a[i], a[i + W / 2], ZIP_HIGH);
        }
        EACH(i, W) a[i] = b[i];
    }
}

/* Whether numbers of the cache are multiplied as pairs of bf16: keys by two of their dimensions, with queries
 * rounded to bf16; values by two positions, an even one and the next, with weights rounded to bf16. (Codes of
 * int8 are exact as bf16, but to make them so takes decode as long as it saves.) */
#if defined(BF16_DOT)
#define PAIRS(type) ((type) == AE_BF16)
#else
#define PAIRS(type) 0
#endif

typedef struct attention {
    const ae_step *step;
    int64_t q_heads, kv_heads, group, dim, padded, partial, block, block_stride, window, stride, row8_group;
    const float *qkv;
    const char *keys, *values;
    float *out;
    int8_t *row8;
    int type, threads;
    float scale; /* of scores, log2(e) included: weights are powers of 2 */
} attention;

/* The positions of one sequence and KV head that a walk over tiles reads. */
typedef struct span {
    const int32_t *table;
    int64_t head, begin, end;
} span;

/* Where the rows of a tile lie. */
typedef struct tile_rows {
    const char *key[TILE_KEYS], *value[TILE_KEYS];
    int32_t from, to; /* of the tile's TILE_KEYS positions */
} tile_rows;

/* Rows that will be read soon. Blocks lie anywhere, so that no hardware guesses where the next one is; and it
 * takes prefetches all through the work on a tile to keep memory busy. */
typedef struct row_queue {
    const char *rows[2 * TILE_KEYS], **at, **end;
    int64_t bytes; /* of a row */
} row_queue;

AE_INLINE void fetch(row_queue *q, int64_t rows) {
    for (; rows > 0 && q->at < q->end; rows--, q->at++)
        for (int64_t byte = 0; byte < q->bytes; byte += 64) __builtin_prefetch(*q->at + byte);
}

typedef struct tile_data {
    float keys[MAX_DIM * TILE_KEYS];   /* transposed: [dim or word][TILE_KEYS] */
    float values[TILE_KEYS * MAX_DIM]; /* [TILE_KEYS][padded]; pairs: words, [TILE_KEYS / 2][padded] */
    float key_scale[TILE_KEYS], value_scale[TILE_KEYS];
    const char *value[TILE_KEYS]; /* rows */
} tile_data;

/* The rows of the tile that holds position j, as far as they are in the span. */
static void locate(tile_rows *rows, const attention *a, const span *s, int64_t j) {
    const int64_t size = (int64_t)ae_type_size(a->type) * a->dim, first = j / TILE_KEYS * TILE_KEYS;
    rows->from = s->begin > first ? (int32_t)(s->begin - first) : 0;
    rows->to = s->end - first < TILE_KEYS ? (int32_t)(s->end - first) : TILE_KEYS;
    int64_t number = (first + rows->from) / a->block, offset = (first + rows->from) % a->block;
    for (int64_t i = rows->from; i < rows->to; number++, offset = 0) {
        const int64_t at = s->table[number] * a->block_stride + (s->head * a->block + offset) * size;
        const int64_t left = i + a->block - offset, end = left < rows->to ? left : rows->to;
        const char *key = a->keys + at, *value = a->values + at;
        for (; i < end; i++, key += size, value += size) rows->key[i] = key, rows->value[i] = value;
    }
}

/* Where the scales of int8 keys and values of a block lie, from the block's beginning. */
AE_INLINE int64_t scales_at(const attention *a, const span *s, int64_t position) {
    return s->table[position / a->block] * a->block_stride + ae_kv_scales_at(a->kv_heads, a->block, a->dim) +
           (s->head * a->block + position % a->block) * 4;
}

/* The scales of a tile's int8 rows, [from, to) of the positions from `first` on. */
static void load_scales(tile_data *t, const attention *a, const span *s, int64_t first, int64_t from,
                        int64_t to) {
    for (int64_t i = from; i < to;) {
        const int64_t at = scales_at(a, s, first + i), left = i + a->block - (first + i) % a->block;
        const int64_t end = left < to ? left : to;
        const float *key = (const float *)(a->keys + at), *value = (const float *)(a->values + at);
        for (; i < end; i++) t->key_scale[i] = *key++ * a->scale, t->value_scale[i] = *value++;
    }
}

static void queue_tile(row_queue *q, const attention *a, const span *s, int64_t j) {
    tile_rows tile;
    locate(&tile, a, s, j);
    const int64_t n = tile.to - tile.from, half = n / 2;
    /* Lines of several pages in turn: see fetch.h. */
    const char **key = tile.key + tile.from, **value = tile.value + tile.from, **row = q->rows;
    for (int64_t i = 0; i < half; i++) {
        *row++ = key[i];
        *row++ = value[i];
        *row++ = key[half + i];
        *row++ = value[half + i];
    }
    if (n % 2) *row++ = key[n - 1], *row++ = value[n - 1];
    q->at = q->rows;
    q->end = row;
    q->bytes = (int64_t)ae_type_size(a->type) * a->dim;
    if (a->type != AE_I8) return;
    const int64_t first = j / TILE_KEYS * TILE_KEYS;
    for (int64_t i = tile.from; i < tile.to; i += 16) {
        const int64_t at = scales_at(a, s, first + i);
        __builtin_prefetch(a->keys + at);
        __builtin_prefetch(a->values + at);
    }
}

/* `bytes` bytes of a row, at most a vector, as words; zeros beyond. */
AE_INLINE vf load_words(const char *p, int64_t bytes) {
    if (bytes >= 4 * W) return vf_load((const float *)p);
    if (bytes % 4 == 0) return vf_load_n((const float *)p, (int)bytes / 4);
    float words[W] = {0};
    memcpy(words, p, (size_t)bytes);
    return vf_load(words);
}

/* Columns [i, i + W) of the transposed keys at the dimensions in `bytes` bytes of rows from `byte` on. Words
 * are transposed, and taken apart after that: the fewest shuffles. */
AE_INLINE void load_keys(int type, int expanded, tile_data *t, const char *const *key, int64_t i,
                         int64_t byte, int64_t bytes) {
    const int size = expanded ? (int)ae_type_size(type) : 4, parts = 4 / size;
    vf v[W];
    EACH(k, W) v[k] = load_words(key[i + k] + byte, bytes);
    transpose(v);
    float *to = t->keys + byte / size * TILE_KEYS + i;
    EACH(k, W)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            vf_store(to + (k * parts + part) * TILE_KEYS, expanded ? part_as(type, v[k], part) : v[k]);
}

/* The tile's keys, transposed: as floats if `expanded`, else as words of the cache's type. */
AE_INLINE void load_keys_as(int type, int expanded, tile_data *t, const attention *a, tile_rows *rows,
                            row_queue *ahead) {
    const int64_t size = (int64_t)ae_type_size(expanded ? type : a->type) * a->dim;
    const int64_t from = rows->from, to = rows->to, begin = from / W * W, end = (to + W - 1) / W * W;
    /* Vectors of keys reach beyond the ends; any key does there, for its score is never used. */
    for (int64_t i = begin; i < from; i++) rows->key[i] = rows->key[from];
    for (int64_t i = to; i < end; i++) rows->key[i] = rows->key[from];
    for (int64_t i = begin; i < end; i += W) {
        int64_t byte = 0;
        fetch(ahead, W / 4);
        for (; byte + 4 * W <= size; byte += 4 * W) load_keys(type, expanded, t, rows->key, i, byte, 4 * W);
        if (byte < size) load_keys(type, expanded, t, rows->key, i, byte, size - byte);
    }
}

/* Its values as rows of floats. */
AE_INLINE void load_values_as(int type, tile_data *t, const attention *a, const tile_rows *rows) {
    const int64_t D = a->dim, whole = D / W * W;
    for (int64_t i = rows->from; i < rows->to; i++) {
        float *row = t->values + i * a->padded;
        for (int64_t d = 0; d < whole; d += W) vf_store(row + d, load_as(type, rows->value[i], d, W));
        if (whole < D) vf_store(row + whole, load_as(type, rows->value[i], whole, D - whole));
        t->value[i] = (const char *)row;
    }
}

#if defined(BF16_DOT)
/* Its values as pairs; zeros for a position that the tile does not have. */
static void pair_values(tile_data *t, const attention *a, const tile_rows *rows, row_queue *ahead) {
    static const uint16_t none[MAX_DIM];
    for (int64_t i = rows->from / 2 * 2; i < rows->to; i += 2) {
        const void *low = i < rows->from ? (const void *)none : rows->value[i];
        const void *high = i + 1 < rows->to ? rows->value[i + 1] : (const void *)none;
        fetch(ahead, 2);
        for (int64_t d = 0; d < a->dim; d += W)
            vi_store(t->values + i / 2 * a->padded + d,
                     bf16_words(load_as(AE_BF16, low, d, a->dim - d), load_as(AE_BF16, high, d, a->dim - d)));
    }
}
#endif

/* Brings a tile into scratch: keys transposed, as floats if `expanded` and else as words of the cache's type;
 * values as rows of floats, or where they lie, or in pairs. Meanwhile what is `ahead` comes nearer. */
static __attribute__((noinline)) void load_tile(tile_data *t, const attention *a, const span *s,
                                                tile_rows *rows, int64_t first, int expanded,
                                                row_queue *ahead) {
#if defined(BF16_DOT)
    if (PAIRS(a->type)) {
        load_keys_as(AE_F32, 0, t, a, rows, ahead);
        pair_values(t, a, rows, ahead);
        return;
    }
#endif
    if (a->type == AE_F32 || !expanded) {
        load_keys_as(AE_F32, 0, t, a, rows, ahead);
        for (int64_t i = rows->from; i < rows->to; i++) t->value[i] = rows->value[i];
    } else if (a->type == AE_BF16) {
        load_keys_as(AE_BF16, 1, t, a, rows, ahead);
        load_values_as(AE_BF16, t, a, rows);
    } else if (a->type == AE_F16) {
        load_keys_as(AE_F16, 1, t, a, rows, ahead);
        load_values_as(AE_F16, t, a, rows);
    } else {
        load_keys_as(AE_I8, 1, t, a, rows, ahead);
        load_values_as(AE_I8, t, a, rows);
    }
    if (a->type == AE_I8) load_scales(t, a, s, first, rows->from, rows->to);
}

#undef ZIP
#undef ZIP_LOW
#undef ZIP_HIGH
