/* The arithmetic of attention: tiles of lines over splits of positions (see impl_attention.h). */
#pragma once
#include "attention.h"
#include "typed.h"

#if W == 16
#define VECTORS 4 /* per register block; with up to 4 lines these are the accumulators */
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif W == 8
#define VECTORS 2
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define VECTORS 2
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
    for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) {
            b[2 * i] = ZIP(a[i], a[i + W / 2], ZIP_LOW);
            b[2 * i + 1] = ZIP(a[i], a[i + W / 2], ZIP_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) a[i] = b[i];
    }
}

typedef struct attention {
    const ae_step *step;
    int64_t q_heads, kv_heads, group, dim, padded, partial, block, window, stride;
    const float *qkv;
    const char *keys, *values;
    float *out;
    int type;
    float scale;
} attention;

/* A thread's scratch. Rows of acc, merged and value copies are `padded` floats long. */
typedef struct line_tile {
    float keys[MAX_DIM * TILE_KEYS]; /* transposed: [dim][TILE_KEYS] */
    float values[TILE_KEYS * MAX_DIM];
    float acc[TILE_LINES * MAX_DIM], merged[TILE_LINES * MAX_DIM];
    float scores[TILE_LINES * TILE_KEYS];
    float m[TILE_LINES], l[TILE_LINES], merged_m[TILE_LINES], merged_l[TILE_LINES];
    const float *query[TILE_LINES];
    const float *value[TILE_KEYS];
    int32_t first[TILE_LINES], last[TILE_LINES]; /* line i sees positions [first, last) */
    int64_t lines, begin, end;                   /* the union of these */
} line_tile;

_Static_assert(sizeof(line_tile) <= AE_SCRATCH, "the scratch of attention");

/* Columns [i, i + W) of the transposed keys at dimensions [d, d + W), of which n exist. */
AE_INLINE void load_keys(int type, line_tile *t, const char *const *key, int64_t i, int64_t d, int64_t n) {
    vf v[W];
#pragma GCC unroll 16
    for (int k = 0; k < W; k++) v[k] = load_as(type, key[i + k], d, n);
    transpose(v);
#pragma GCC unroll 16
    for (int k = 0; k < W; k++) vf_store(t->keys + (d + k) * TILE_KEYS + i, v[k]);
}

/* Positions [j + from, j + to) of one sequence and KV head: keys transposed, values as rows of floats. */
AE_INLINE void load_tile_as(int type, line_tile *t, const attention *a, const int32_t *table, int64_t head,
                            int64_t j, int64_t from, int64_t to) {
    const int64_t D = a->dim, size = (int64_t)ae_type_size(type) * D, whole = D / W * W;
    const char *key[TILE_KEYS];
    int64_t number = (j + from) / a->block, offset = (j + from) % a->block;
    for (int64_t i = from; i < to; i++) {
        const int64_t at = ((table[number] * a->kv_heads + head) * a->block + offset) * size;
        key[i] = a->keys + at;
        t->value[i] = (const float *)(a->values + at);
        for (int64_t byte = 0; byte < size; byte += 64) { /* blocks lie anywhere: no hardware can guess */
            __builtin_prefetch(key[i] + byte);
            __builtin_prefetch((const char *)t->value[i] + byte);
        }
        if (++offset == a->block) offset = 0, number++;
    }
    /* Vectors of keys reach beyond the ends; any key does there, for its score is never used. */
    const int64_t begin = from / W * W, end = (to + W - 1) / W * W;
    for (int64_t i = begin; i < from; i++) key[i] = key[from];
    for (int64_t i = to; i < end; i++) key[i] = key[from];
    for (int64_t i = begin; i < end; i += W) {
        for (int64_t d = 0; d < whole; d += W) load_keys(type, t, key, i, d, W);
        if (whole < D) load_keys(type, t, key, i, whole, D - whole);
    }
    if (type == AE_F32 && whole == D) return;
    for (int64_t i = from; i < to; i++) {
        float *row = t->values + i * a->padded;
        for (int64_t d = 0; d < whole; d += W) vf_store(row + d, load_as(type, t->value[i], d, W));
        if (whole < D) vf_store(row + whole, load_as(type, t->value[i], whole, D - whole));
        t->value[i] = row;
    }
}

static void load_tile(line_tile *t, const attention *a, const int32_t *table, int64_t head, int64_t j,
                      int64_t from, int64_t to) {
    if (a->type == AE_F32) load_tile_as(AE_F32, t, a, table, head, j, from, to);
    else if (a->type == AE_BF16) load_tile_as(AE_BF16, t, a, table, head, j, from, to);
    else load_tile_as(AE_F16, t, a, table, head, j, from, to);
}

/* scores = scale * query . key for `lines` lines and the keys [from, to), to whole blocks of vectors. */
AE_INLINE void score(int lines, line_tile *t, const attention *a, int64_t line, int64_t from, int64_t to) {
    const vf scale = vf_set(a->scale);
    const float *query[4];
    for (int r = 0; r < lines; r++) query[r] = t->query[line + r];
    for (int64_t i = from / (VECTORS * W) * (VECTORS * W); i < to; i += VECTORS * W) {
        vf sum[4][VECTORS];
        for (int r = 0; r < lines; r++)
            for (int k = 0; k < VECTORS; k++) sum[r][k] = vf_zero();
        const float *key = t->keys + i;
        for (int64_t d = 0; d < a->dim; d++, key += TILE_KEYS) {
            vf column[VECTORS];
            for (int k = 0; k < VECTORS; k++) column[k] = vf_load(key + k * W);
            for (int r = 0; r < lines; r++) {
                const vf q = vf_set(query[r][d]);
                for (int k = 0; k < VECTORS; k++) sum[r][k] = vf_fma(q, column[k], sum[r][k]);
            }
        }
        for (int r = 0; r < lines; r++)
            for (int k = 0; k < VECTORS; k++)
                vf_store(t->scores + (line + r) * TILE_KEYS + i + k * W, vf_mul(sum[r][k], scale));
    }
}

/* Scores of one line into weights exp(score - m); its partial so far is scaled to the new maximum. Not
 * inlined, so that there is one compilation of its arithmetic. */
static __attribute__((noinline)) void weights(line_tile *t, const attention *a, int64_t line, int64_t from,
                                              int64_t to) {
    float *s = t->scores + line * TILE_KEYS;
    const int64_t begin = from / W * W, end = (to + W - 1) / W * W;
    for (int64_t i = begin; i < from; i++) s[i] = -INFINITY;
    for (int64_t i = to; i < end; i++) s[i] = -INFINITY;
    vf max = vf_set(t->m[line]);
    for (int64_t i = begin; i < end; i += W) max = vf_max(max, vf_load(s + i));
    const float m = vf_hmax(max);
    if (m != t->m[line]) {
        const float factor = expf(t->m[line] - m);
        float *acc = t->acc + line * a->padded;
        for (int64_t d = 0; d < a->padded; d += W)
            vf_store(acc + d, vf_mul(vf_load(acc + d), vf_set(factor)));
        t->l[line] *= factor;
        t->m[line] = m;
    }
    vf sum = vf_zero();
    for (int64_t i = begin; i < end; i += W) {
        vf p = vf_exp(vf_sub(vf_load(s + i), vf_set(m)));
        vf_store(s + i, p);
        sum = vf_add(sum, p);
    }
    t->l[line] += vf_sum(sum);
}

/* acc[d .. d + vectors * W) += sum over keys of weight * value. */
AE_INLINE void accumulate_at(int lines, int vectors, line_tile *t, int64_t padded, int64_t line, int64_t d,
                             int64_t from, int64_t to) {
    vf sum[4][VECTORS];
    float *acc = t->acc + line * padded + d;
    const float *p = t->scores + line * TILE_KEYS;
    for (int r = 0; r < lines; r++)
        for (int k = 0; k < vectors; k++) sum[r][k] = vf_load(acc + r * padded + k * W);
    for (int64_t i = from; i < to; i++) {
        vf v[VECTORS];
        for (int k = 0; k < vectors; k++) v[k] = vf_load(t->value[i] + d + k * W);
        for (int r = 0; r < lines; r++) {
            const vf weight = vf_set(p[r * TILE_KEYS + i]);
            for (int k = 0; k < vectors; k++) sum[r][k] = vf_fma(weight, v[k], sum[r][k]);
        }
    }
    for (int r = 0; r < lines; r++)
        for (int k = 0; k < vectors; k++) vf_store(acc + r * padded + k * W, sum[r][k]);
}

/* `lines` lines over the keys [from, to) of the tile that begins at position j. */
AE_INLINE void attend_lines(int lines, line_tile *t, const attention *a, int64_t line, int64_t j,
                            int64_t from, int64_t to) {
    int64_t begin = to, end = from;
    int64_t first[4], last[4];
    for (int r = 0; r < lines; r++) {
        first[r] = t->first[line + r] - j > from ? t->first[line + r] - j : from;
        last[r] = t->last[line + r] - j < to ? t->last[line + r] - j : to;
        if (first[r] >= last[r]) continue;
        begin = first[r] < begin ? first[r] : begin;
        end = last[r] > end ? last[r] : end;
    }
    if (begin >= end) return;
    score(lines, t, a, line, begin, end);
    for (int r = 0; r < lines; r++) {
        float *p = t->scores + (line + r) * TILE_KEYS;
        const int sees = first[r] < last[r];
        if (sees) weights(t, a, line + r, first[r], last[r]);
        /* What the line does not see weighs nothing: adding 0 * value leaves the bits of the sum. */
        for (int64_t i = begin; i < (sees ? first[r] : end); i++) p[i] = 0.0f;
        for (int64_t i = sees ? last[r] : end; i < end; i++) p[i] = 0.0f;
    }
    int64_t d = 0;
    for (; d + VECTORS * W <= a->padded; d += VECTORS * W)
        accumulate_at(lines, VECTORS, t, a->padded, line, d, begin, end);
    for (; d < a->padded; d += W) accumulate_at(lines, 1, t, a->padded, line, d, begin, end);
}

/* The partials of all lines over the positions [begin, end), which lie in one split. */
static void attend_split(line_tile *t, const attention *a, const int32_t *table, int64_t head, int64_t begin,
                         int64_t end) {
    memset(t->acc, 0, (size_t)(t->lines * a->padded) * sizeof(float));
    for (int64_t i = 0; i < t->lines; i++) t->m[i] = -INFINITY, t->l[i] = 0.0f;
    for (int64_t j = begin / TILE_KEYS * TILE_KEYS; j < end; j += TILE_KEYS) {
        const int64_t from = begin > j ? begin - j : 0, to = end - j < TILE_KEYS ? end - j : TILE_KEYS;
        load_tile(t, a, table, head, j, from, to);
        int64_t line = 0;
        for (; line + 4 <= t->lines; line += 4) attend_lines(4, t, a, line, j, from, to);
        if (t->lines - line == 3) attend_lines(3, t, a, line, j, from, to);
        if (t->lines - line == 2) attend_lines(2, t, a, line, j, from, to);
        if (t->lines - line == 1) attend_lines(1, t, a, line, j, from, to);
    }
}

/* (M, L, out) <- the union of it and the partial (m, l, acc). Not inlined, see `weights`. */
static __attribute__((noinline)) void merge(float *out, float *M, float *L, const float *acc, float m,
                                            float l, int64_t padded) {
    if (l == 0.0f) return; /* saw nothing in this split */
    const float max = *M > m ? *M : m, old = expf(*M - max), new = expf(m - max);
    for (int64_t d = 0; d < padded; d += W)
        vf_store(out + d, vf_fma(vf_load(acc + d), vf_set(new), vf_mul(vf_load(out + d), vf_set(old))));
    *L = *L * old + l * new;
    *M = max;
}

static void finish(float *out, const float *merged, float L, int64_t dim) {
    const float scale = 1.0f / L;
    for (int64_t d = 0; d < dim; d++) out[d] = merged[d] * scale;
}

#undef ZIP
#undef VECTORS
#undef ZIP_LOW
#undef ZIP_HIGH
