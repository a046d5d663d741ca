/* Keys and values of a tile of positions, from the paged cache into a thread's scratch. */
#pragma once
#include "attention.h"
#include "simd_int.h"
#include "typed.h"

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc has that one since version 12 only */
typedef int32_t lane_numbers __attribute__((vector_size(4 * W)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lane_numbers){__VA_ARGS__})
#endif

/* Of every four words of a and of b: the first two, or last two, word by word in turn, or both at once; and of all
 * fours of a, then of b, every second one. */
#if W == 16
#define LOW_WORDS(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH_WORDS(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN_FOURS(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD_FOURS(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif W == 8
#define LOW_WORDS(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH_WORDS(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVEN_FOURS(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODD_FOURS(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define LOW_WORDS(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH_WORDS(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOW_PAIRS(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH_PAIRS(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#endif

/* Transposes W vectors: the words of every four by four, which stay where they are; then these fours. */
AE_INLINE void transpose(vf *a) {
    vf b[W];
    EACH(i, W / 2) {
        b[2 * i] = LOW_WORDS(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = HIGH_WORDS(a[2 * i], a[2 * i + 1]);
    }
    EACH(i, W / 4) {
        a[4 * i] = LOW_PAIRS(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = HIGH_PAIRS(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = LOW_PAIRS(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = HIGH_PAIRS(b[4 * i + 1], b[4 * i + 3]);
    }
#if W > 4
    EACH(j, 4) {
        EACH(i, W / 8) {
            b[4 * i + j] = EVEN_FOURS(a[8 * i + j], a[8 * i + 4 + j]);
            b[W / 2 + 4 * i + j] = ODD_FOURS(a[8 * i + j], a[8 * i + 4 + j]);
        }
#if W == 8
        a[j] = b[j];
        a[4 + j] = b[4 + j];
#else
        a[j] = EVEN_FOURS(b[j], b[4 + j]);
        a[8 + j] = ODD_FOURS(b[j], b[4 + j]);
        a[4 + j] = EVEN_FOURS(b[8 + j], b[12 + j]);
        a[12 + j] = ODD_FOURS(b[8 + j], b[12 + j]);
#endif
    }
#endif
}

/* Whether numbers of the cache are multiplied as pairs of bf16: keys by two of their dimensions, with queries
 * rounded to bf16; values by two positions, an even one and the next, with weights rounded to bf16. */
#if defined(BF16_DOT)
#define PAIRS(type) ((type) == AE_BF16)
#else
#define PAIRS(type) 0
#endif

/* Whether codes of the cache are multiplied as they are (attention_codes.h). */
#if defined(INT_DOT)
#define INTEGERS(type) ((type) == AE_I8)
#else
#define INTEGERS(type) 0
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

/* What will be read soon: so many runs of bytes, keys and values of blocks. Blocks lie anywhere, so that no hardware
 * guesses where the next one is; and it takes prefetches all through the work on a tile to keep memory busy. */
typedef struct run_queue {
    const char *runs[2 * TILE_KEYS];
    int64_t count, at, bytes; /* each is fetched from `at` on, but the last two end at `last` */
    int64_t last, stride;     /* `stride`: of what a call fetches of each */
} run_queue;

/* Calls of fetch() in each of the four phases of the work on a tile: loading keys, loading values, scores, sums. */
#define FETCHES 4

/* Which of the steps of a phase call it. */
typedef struct pace {
    int64_t period, due;
} pace;

/* Lines of several pages in turn: see fetch.h. */
AE_INLINE void fetch(run_queue *q) {
    for (const int64_t end = q->at + q->stride; q->at < end && q->at < q->bytes; q->at += 64) {
        const int64_t count = q->at < q->last ? q->count : q->count - 2;
        for (int64_t i = 0; i < count; i++) __builtin_prefetch(q->runs[i] + q->at);
    }
}

AE_INLINE pace pace_of(int64_t steps) { return (pace){steps / FETCHES - 1, 0}; }

/* For every step of a phase. */
AE_INLINE void fetch_in_turn(run_queue *q, pace *p) {
    if (--p->due < 0) p->due = p->period, fetch(q);
}

typedef struct tile_data {
    float keys[MAX_DIM * TILE_KEYS];   /* transposed: [dim or word][TILE_KEYS] */
    float values[TILE_KEYS * MAX_DIM]; /* [TILE_KEYS][padded]; words of 2 or 4 positions: [.. / 2 or 4][padded] */
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
        for (; i + W <= end; i += W, key += W, value += W) {
            vf_store(t->key_scale + i, vf_mul(vf_load(key), vf_set(a->scale)));
            vf_store(t->value_scale + i, vf_load(value));
        }
        for (; i < end; i++) t->key_scale[i] = *key++ * a->scale, t->value_scale[i] = *value++;
    }
}

/* The rows of the tile that holds position j. */
static void queue_tile(run_queue *q, const attention *a, const span *s, int64_t j) {
    const int64_t first = j / TILE_KEYS * TILE_KEYS, begin = s->begin > first ? s->begin : first;
    const int64_t end = s->end < first + TILE_KEYS ? s->end : first + TILE_KEYS, block = a->block;
    const int64_t size = (int64_t)ae_type_size(a->type) * a->dim, most = block < TILE_KEYS ? block : TILE_KEYS;
    q->count = q->at = 0;
    for (int64_t i = begin; i < end;) {
        const int64_t offset = most == block ? 0 : first % block, next = (i / block + 1) * block;
        const int64_t at = s->table[i / block] * a->block_stride + (s->head * block + offset) * size;
        q->runs[q->count++] = a->keys + at;
        q->runs[q->count++] = a->values + at;
        q->last = ((next < end ? next : end) - i / block * block - offset) * size;
        i = next;
    }
    q->bytes = q->count > 2 ? most * size : q->last;
    q->stride = (q->bytes + 4 * FETCHES * 64 - 1) / (4 * FETCHES * 64) * 64;
    if (a->type != AE_I8) return;
    for (int64_t i = begin; i < end; i += 16) {
        const int64_t at = scales_at(a, s, i);
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
 * are transposed, and taken apart after that: the fewest shuffles. Codes that stay in words become unsigned. */
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
            if (type == AE_I8 && !expanded) vi_store(to + k * TILE_KEYS, vf_bits(v[k]) ^ vi_set((int32_t)0x80808080));
            else vf_store(to + (k * parts + part) * TILE_KEYS, expanded ? part_as(type, v[k], part) : v[k]);
}

/* The tile's keys, transposed: as floats if `expanded`, else as words of the cache's type. */
AE_INLINE void load_keys_as(int type, int expanded, tile_data *t, const attention *a, tile_rows *rows,
                            run_queue *ahead) {
    const int64_t size = (int64_t)ae_type_size(expanded ? type : a->type) * a->dim;
    const int64_t from = rows->from, to = rows->to, begin = from / W * W, end = (to + W - 1) / W * W;
    /* Vectors of keys reach beyond the ends; any key does there, for its score is never used. */
    for (int64_t i = begin; i < from; i++) rows->key[i] = rows->key[from];
    for (int64_t i = to; i < end; i++) rows->key[i] = rows->key[from];
    pace turn = pace_of(TILE_KEYS / W);
    for (int64_t i = begin; i < end; i += W) {
        int64_t byte = 0;
        fetch_in_turn(ahead, &turn);
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

/* Values as words of 2 positions (pairs) or 4, given the rows of these: W words from dimension d on, of which n
 * exist. */
AE_INLINE vi words_of(int positions, const char *const *row, int64_t d, int64_t n) {
    char tail[4][2 * W] = {{0}};
    const char *at[4];
    EACH(i, positions) {
        at[i] = row[i] + d * (4 / positions);
        if (n < W) at[i] = memcpy(tail[i], at[i], (size_t)(n * (4 / positions)));
    }
#if defined(BF16_DOT)
    if (positions == 2) return vi_pairs(at[0], at[1]);
#endif
    return vi_quads(at);
}

/* Values as such words, `beyond` for positions that the tile does not have. */
AE_INLINE void load_words_of(int positions, tile_data *t, const attention *a, tile_rows *rows, const char *beyond,
                             run_queue *ahead) {
    const int64_t D = a->dim, whole = D / W * W;
    const int64_t from = rows->from / positions, to = (rows->to + positions - 1) / positions;
    for (int64_t i = from * positions; i < rows->from; i++) rows->value[i] = beyond;
    for (int64_t i = rows->to; i < to * positions; i++) rows->value[i] = beyond;
    pace turn = pace_of(TILE_KEYS / positions);
    for (int64_t i = from; i < to; i++) {
        const char *const *row = rows->value + i * positions;
        float *words = t->values + i * a->padded;
        fetch_in_turn(ahead, &turn);
        for (int64_t d = 0; d < whole; d += W) vi_store(words + d, words_of(positions, row, d, W));
        if (whole < D) vi_store(words + whole, words_of(positions, row, whole, D - whole));
    }
}

/* Brings a tile into scratch: keys transposed, as floats if `expanded` and else as words of the cache's type;
 * values as rows of floats, or where they lie, or as words of 2 or 4 positions. Meanwhile what is `ahead`
 * comes nearer. */
static __attribute__((noinline)) void load_tile(tile_data *t, const attention *a, const span *s,
                                                tile_rows *rows, int64_t first, int expanded,
                                                run_queue *ahead) {
#if defined(BF16_DOT)
    if (PAIRS(a->type)) {
        static const uint16_t zeros[MAX_DIM];
        load_keys_as(AE_F32, 0, t, a, rows, ahead);
        load_words_of(2, t, a, rows, (const char *)zeros, ahead);
        return;
    }
#endif
#if defined(INT_DOT)
    if (INTEGERS(a->type)) {
        load_keys_as(AE_I8, 0, t, a, rows, ahead);
        load_words_of(4, t, a, rows, rows->value[rows->from], ahead); /* weights of any others are zeros */
        load_scales(t, a, s, first, rows->from, rows->to);
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

#undef SHUFFLE
#undef LOW_WORDS
#undef HIGH_WORDS
#undef LOW_PAIRS
#undef HIGH_PAIRS
#undef EVEN_FOURS
#undef ODD_FOURS
