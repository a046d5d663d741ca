/* The arithmetic of attention: tiles of lines over tiles of keys (see impl_attention.h). */
#pragma once
#include "attention_codes.h"

#if defined(BF16_DOT)
/* score_at() of pairs. */
AE_INLINE void score_pairs_at(int lines, int vectors, attention_scratch *s, const attention *a, int64_t line,
                              int64_t i) {
    vf sum[LINES][VECTORS];
    const float *key = s->data.keys + i;
    const int32_t *query = (const int32_t *)s->queries.pairs + line * a->padded / 2;
    EACH(r, lines) EACH(k, vectors) sum[r][k] = vf_zero();
    pace turn = pace_of(a->dim / 2);
    for (int64_t words = (a->dim + 1) / 2; words > 0; words--, query++, key += TILE_KEYS) {
        vi column[VECTORS];
        EACH(k, vectors) column[k] = vi_load(key + k * W);
        fetch_in_turn(&s->ahead, &turn);
        EACH(r, lines) {
            const bf16_pair q = bf16_pair_of(query[r * a->padded / 2]);
            EACH(k, vectors) sum[r][k] = bf16_dot(sum[r][k], q, column[k]);
        }
    }
    EACH(r, lines) EACH(k, vectors)
        vf_store(s->scores + (line % BATCH + r) * TILE_KEYS + i + k * W,
                 vf_mul(sum[r][k], vf_load(s->data.key_scale + i + k * W)));
}
#endif

/* scores[i .. i + vectors * W) = scale * query . key, dimension by dimension. `type` says what the transposed
 * keys are: floats, or words of that type. */
AE_INLINE void score_at(int lines, int vectors, int type, attention_scratch *s, const attention *a,
                        const line_tile *t, int64_t line, int64_t i) {
#if defined(BF16_DOT)
    if (PAIRS(type)) {
        score_pairs_at(lines, vectors, s, a, line, i);
        return;
    }
#endif
#if defined(INT_DOT)
    if (INTEGERS(type)) {
        score_codes_at(lines, vectors, s, a, line, i);
        return;
    }
#endif
    const int64_t dim = a->dim;
    const int parts = 4 / (int)ae_type_size(type);
    vf sum[LINES][VECTORS];
    const float *query[LINES], *key = s->data.keys + i;
    for (int r = 0; r < lines; r++) {
        query[r] = t->query[line + r];
        for (int k = 0; k < vectors; k++) sum[r][k] = vf_zero();
    }
#define SCORE_PART(part)                                                                       \
    do {                                                                                       \
        vf column[VECTORS];                                                                    \
        for (int k = 0; k < vectors; k++) column[k] = part_as(type, word[k], part);            \
        for (int r = 0; r < lines; r++) {                                                      \
            const vs q = vs_load(&query[r][d + part]);                                         \
            for (int k = 0; k < vectors; k++) sum[r][k] = vs_fma(q, column[k], sum[r][k]);     \
        }                                                                                      \
    } while (0)
    vf word[VECTORS];
    pace turn = pace_of(dim / parts);
    int64_t d = 0;
    for (; d + parts <= dim; d += parts, key += TILE_KEYS) {
        for (int k = 0; k < vectors; k++) word[k] = vf_load(key + k * W);
        fetch_in_turn(&s->ahead, &turn);
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) SCORE_PART(part);
    }
    if (parts > 1 && d < dim) {
        for (int k = 0; k < vectors; k++) word[k] = vf_load(key + k * W);
        SCORE_PART(0);
        if (parts > 2 && d + 1 < dim) SCORE_PART(1);
        if (parts > 2 && d + 2 < dim) SCORE_PART(2);
    }
#undef SCORE_PART
    for (int r = 0; r < lines; r++)
        for (int k = 0; k < vectors; k++)
            vf_store(s->scores + (line % BATCH + r) * TILE_KEYS + i + k * W,
                     vf_mul(sum[r][k], vf_load(s->data.key_scale + i + k * W)));
}

AE_INLINE void score(int lines, int type, attention_scratch *s, const attention *a, const line_tile *t,
                     int64_t line) {
    int64_t begin = TILE_KEYS, end = 0;
    for (int r = 0; r < lines; r++) {
        const int64_t from = s->from[line + r], to = s->to[line + r];
        if (from >= to) continue;
        begin = from < begin ? from : begin;
        end = to > end ? to : end;
    }
    int64_t i = begin / W * W;
    for (; i + (VECTORS - 1) * W < end && i + VECTORS * W <= TILE_KEYS; i += VECTORS * W)
        score_at(lines, VECTORS, type, s, a, t, line, i);
    for (; i < end; i += W) score_at(lines, 1, type, s, a, t, line, i);
}

/* Scores of lines [lo, hi) into weights 2^(score - m), and `factor`, by which what a line has so far is to be
 * scaled. Each loop is over all of them, for one line's chain of operations is long. */
AE_INLINE void weights_as(int type, attention_scratch *s, int64_t lo, int64_t hi) {
    for (int64_t line = lo; line < hi; line++) {
        const int64_t from = s->from[line], to = s->to[line];
        float *p = s->scores + line % BATCH * TILE_KEYS;
        s->drop[line] = 0.0f;
        if (from >= to) {
#if defined(INT_DOT)
            if (INTEGERS(type)) weights_of(s, line)->scale = 0.0f; /* the rest does not matter then */
#endif
            continue;
        }
        for (int64_t i = 0; i < from; i++) p[i] = -INFINITY;
        for (int64_t i = to; i < TILE_KEYS; i++) p[i] = -INFINITY;
        const float old = s->m[line];
        vf max = vf_set(old);
        EACH(i, TILE_KEYS / W) max = vf_max(max, vf_load(p + i * W));
        s->m[line] = vf_hmax(max);
        s->drop[line] = old - s->m[line];
    }
    for (int64_t line = lo; line < hi; line += W)
        vf_store(s->factor + line, vf_exp2(vf_load(s->drop + line)));
    for (int64_t line = lo; line < hi; line++) {
        if (s->from[line] >= s->to[line]) continue;
        float *p = s->scores + line % BATCH * TILE_KEYS, *total = s->l + line * W;
        const vf m = vf_set(s->m[line]);
        vf sum = vf_mul(vf_load(total), vf_set(s->factor[line])), x[TILE_KEYS / W];
        EACH(i, TILE_KEYS / W) x[i] = vf_exp2(vf_sub(vf_load(p + i * W), m));
        EACH(i, TILE_KEYS / W) sum = vf_add(sum, x[i]);
        vf_store(total, sum);
#if defined(INT_DOT)
        if (INTEGERS(type)) {
            weight_units *u = &s->units;
            code_weights *out = weights_of(s, line);
            if (u->from != s->from[line] || u->to != s->to[line])
                find_units(u, s->data.value_scale, s->from[line], s->to[line]);
            EACH(i, TILE_KEYS / W)
                vi_store_bytes(out->high + i * W, out->low + i * W, to_codes(vf_mul(x[i], vf_load(u->of + i * W))));
            out->scale = u->unit;
            continue;
        }
#endif
#if defined(BF16_DOT)
        if (PAIRS(type)) {
            EACH(i, TILE_KEYS / W) bf16_put((uint16_t *)p + i * W, x[i]);
            continue;
        }
#endif
        EACH(i, TILE_KEYS / W)
            vf_store(p + i * W, type == AE_I8 ? vf_mul(x[i], vf_load(s->data.value_scale + i * W)) : x[i]);
    }
}

/* Not inlined, so that there is one compilation of its arithmetic. Those of pairs are bf16, from the row's
 * beginning on; those of int8 are multiplied by the scales of values, or `code_weights`. */
static __attribute__((noinline)) void weights(attention_scratch *s, const attention *a, int64_t lo,
                                              int64_t hi) {
    if (a->type == AE_I8) weights_as(AE_I8, s, lo, hi);
    else if (PAIRS(a->type)) weights_as(AE_BF16, s, lo, hi);
    else weights_as(AE_F32, s, lo, hi);
}

#if defined(BF16_DOT)
/* Sums of the keys [from, to) of pairs: of one that they hold half of, the other half's weights are zero and
 * `seen` keeps its values, whatever they are, out of it. */
AE_INLINE void add_pairs(int lines, int vectors, vf sum[LINES][VECTORS], attention_scratch *s, int64_t padded,
                         int64_t line, int64_t d, int64_t from, int64_t to) {
    const int32_t *weight = (const int32_t *)(s->scores + line % BATCH * TILE_KEYS);
    const float *value = s->data.values + d;
#define ADD_PAIR(pair, seen)                                                        \
    do {                                                                            \
        vi v[VECTORS];                                                              \
        if (d == 0) fetch_in_turn(&s->ahead, &turn);                                \
        EACH(k, vectors) v[k] = vi_load(value + (pair) * padded + k * W) seen;      \
        EACH(r, lines) {                                                            \
            const bf16_pair w = bf16_pair_of(weight[r * TILE_KEYS + (pair)]);       \
            EACH(k, vectors) sum[r][k] = bf16_dot(sum[r][k], w, v[k]);              \
        }                                                                           \
    } while (0)
    pace turn = pace_of(TILE_KEYS / 2);
    int64_t pair = from / 2;
    if (from % 2) {
        ADD_PAIR(pair, &vi_set((int32_t)0xFFFF0000));
        pair++;
    }
    for (; pair < to / 2; pair++) ADD_PAIR(pair, );
    if (to % 2) ADD_PAIR(to / 2, &vi_set(0xFFFF));
#undef ADD_PAIR
}
#endif

/* acc[d .. d + vectors * W) = factor * acc + sum over the keys [from, to) of weight * value, of which n
 * dimensions exist. */
AE_INLINE void accumulate_at(int lines, int vectors, int type, attention_scratch *s, int64_t padded,
                             int64_t line, int64_t d, int64_t n, int64_t from, int64_t to) {
    vf sum[LINES][VECTORS];
    float *acc = s->acc + line * padded + d;
    const float *p = s->scores + line % BATCH * TILE_KEYS;
    for (int r = 0; r < lines; r++)
        for (int k = 0; k < vectors; k++)
            sum[r][k] = vf_mul(vf_load(acc + r * padded + k * W), vf_set(s->factor[line + r]));
#if defined(BF16_DOT)
    if (PAIRS(type)) {
        add_pairs(lines, vectors, sum, s, padded, line, d, from, to);
        from = to;
    }
#endif
    pace turn = pace_of(TILE_KEYS);
    for (int64_t i = from; i < to; i++) {
        const char *value = s->data.value[i] + d * (int64_t)ae_type_size(type);
        if (d == 0) fetch_in_turn(&s->ahead, &turn);
        vf v[VECTORS];
        for (int k = 0; k < vectors; k++) v[k] = load_as(type, value, k * W, n);
        for (int r = 0; r < lines; r++) {
            const vs weight = vs_load(&p[r * TILE_KEYS + i]);
            for (int k = 0; k < vectors; k++) sum[r][k] = vs_fma(weight, v[k], sum[r][k]);
        }
    }
    for (int r = 0; r < lines; r++)
        for (int k = 0; k < vectors; k++) vf_store(acc + r * padded + k * W, sum[r][k]);
}

AE_INLINE void accumulate(int lines, int type, attention_scratch *s, const attention *a, int64_t line,
                          int64_t from, int64_t to) {
    const int64_t D = a->dim;
    int64_t d = 0;
    for (; d + VECTORS * W <= D; d += VECTORS * W)
        accumulate_at(lines, VECTORS, type, s, a->padded, line, d, W, from, to);
    for (; d + W <= D; d += W) accumulate_at(lines, 1, type, s, a->padded, line, d, W, from, to);
    if (d < D) accumulate_at(lines, 1, type, s, a->padded, line, d, D - d, from, to);
    for (int r = 0; r < lines; r++) s->factor[line + r] = 1.0f;
}

/* The keys that all lines of the block see are added together, the others line by line: no line ever touches
 * what it does not see. A line's pairs are added one by one in either way. `one` is for one line. */
AE_INLINE void accumulate_block(int lines, int type, attention_scratch *s, const attention *a, int64_t line,
                                void (*one)(attention_scratch *, const attention *, int64_t, int64_t,
                                            int64_t)) {
#if defined(INT_DOT)
    if (INTEGERS(type)) {
        accumulate_codes(lines < CODE_LINES ? lines : CODE_LINES, s, a, line);
        if (lines > CODE_LINES) accumulate_codes(lines - CODE_LINES, s, a, line + CODE_LINES);
        return;
    }
#endif
    int64_t from = 0, to = TILE_KEYS;
    int alike = 1;
    for (int r = 0; r < lines; r++) {
        from = s->from[line + r] > from ? s->from[line + r] : from;
        to = s->to[line + r] < to ? s->to[line + r] : to;
        alike &= s->from[line + r] == s->from[line] && s->to[line + r] == s->to[line];
    }
    if (PAIRS(type) && !alike) from = (from + 1) / 2 * 2, to = to / 2 * 2;
    if (from >= to) {
        for (int r = 0; r < lines; r++)
            if (s->from[line + r] < s->to[line + r]) one(s, a, line + r, s->from[line + r], s->to[line + r]);
        return;
    }
    for (int r = 0; r < lines; r++)
        if (s->from[line + r] < from) one(s, a, line + r, s->from[line + r], from);
    accumulate(lines, type, s, a, line, from, to);
    for (int r = 0; r < lines; r++)
        if (to < s->to[line + r]) one(s, a, line + r, to, s->to[line + r]);
}

/* A register block of lines; a function of its own, so that it has all registers to itself. */
typedef struct block_kernel {
    void (*score)(attention_scratch *s, const attention *a, const line_tile *t, int64_t line);
    void (*accumulate)(attention_scratch *s, const attention *a, int64_t line);
} block_kernel;

#define NOINLINE static __attribute__((noinline)) void
#define BLOCK(name, type, n)                                                                                 \
    NOINLINE score_##name##_##n(attention_scratch *s, const attention *a, const line_tile *t, int64_t line) {\
        score(n, type, s, a, t, line);                                                                       \
    }                                                                                                        \
    NOINLINE accumulate_##name##_##n(attention_scratch *s, const attention *a, int64_t line) {               \
        accumulate_block(n, type, s, a, line, accumulate_one_##name);                                        \
    }
#define BLOCKS(name, type)                                                                                   \
    NOINLINE accumulate_one_##name(attention_scratch *s, const attention *a, int64_t line, int64_t from,     \
                                   int64_t to) {                                                             \
        accumulate(1, type, s, a, line, from, to);                                                           \
    }                                                                                                        \
    BLOCK(name, type, 1)                                                                                     \
    BLOCK(name, type, 2)                                                                                     \
    BLOCK(name, type, 3)                                                                                     \
    BLOCK(name, type, 4)                                                                                     \
    BLOCK(name, type, 5)                                                                                     \
    BLOCK(name, type, 6)                                                                                     \
    static const block_kernel blocks_##name[LINES] = {                                                       \
        {score_##name##_1, accumulate_##name##_1}, {score_##name##_2, accumulate_##name##_2},                \
        {score_##name##_3, accumulate_##name##_3}, {score_##name##_4, accumulate_##name##_4},                \
        {score_##name##_5, accumulate_##name##_5}, {score_##name##_6, accumulate_##name##_6},                \
    };
BLOCKS(f32, AE_F32)
BLOCKS(bf16, AE_BF16)
BLOCKS(f16, AE_F16)
BLOCKS(i8, AE_I8)

/* All lines of the tile over the tile of keys in scratch. */
static void attend(attention_scratch *s, const attention *a, const line_tile *t, const block_kernel *blocks) {
    for (int64_t lo = 0; lo < t->lines; lo += BATCH) {
        const int64_t hi = lo + BATCH < t->lines ? lo + BATCH : t->lines;
        for (int64_t line = lo; line < hi; line += LINES)
            blocks[line + LINES <= hi ? LINES - 1 : hi - line - 1].score(s, a, t, line);
        weights(s, a, lo, hi);
        for (int64_t line = lo; line < hi; line += LINES)
            blocks[line + LINES <= hi ? LINES - 1 : hi - line - 1].accumulate(s, a, line);
    }
}

/* The partials of all lines over the positions [begin, end) of their span, which lie in one split. `next` is
 * what this thread will work on after it has done the span, or NULL. */
NOINLINE attend_split(attention_scratch *s, const attention *a, const line_tile *t, int64_t begin,
                      int64_t end, const line_tile *next) {
    const span part = {t->keys.table, t->keys.head, begin, end};
    /* Expanding a tile to floats pays where several blocks of lines read it. */
    const int expanded = !PAIRS(a->type) && !INTEGERS(a->type) && (t->lines > LINES || a->type == AE_F32);
    const block_kernel *blocks = expanded             ? blocks_f32
                                 : a->type == AE_BF16 ? blocks_bf16
                                 : a->type == AE_F16  ? blocks_f16
                                                      : blocks_i8;
    memset(s->acc, 0, (size_t)(t->lines * a->padded) * sizeof(float));
    memset(s->l, 0, (size_t)(t->lines * W) * sizeof(float));
    for (int64_t i = 0; i < t->lines; i++) s->m[i] = -INFINITY;
#if defined(BF16_DOT)
    for (int64_t i = 0; i < t->lines && PAIRS(a->type); i++)
        for (int64_t d = 0; d < a->padded; d += W)
            bf16_put(s->queries.pairs + i * a->padded + d, load_as(AE_F32, t->query[i], d, a->dim - d));
#endif
#if defined(INT_DOT)
    if (INTEGERS(a->type)) quantize_queries(s, a, t);
#endif
    for (int64_t j = begin / TILE_KEYS * TILE_KEYS; j < end; j += TILE_KEYS) {
        locate(&s->rows, a, &part, j);
        s->ahead.bytes = 0;
        if (t->lines > LINES) { /* long at work on each tile: memory keeps up by itself */
        } else if (j + TILE_KEYS < t->keys.end) queue_tile(&s->ahead, a, &t->keys, j + TILE_KEYS);
        else if (next) queue_tile(&s->ahead, a, &next->keys, next->keys.begin);
        s->units.to = 0; /* of no line */
        load_tile(&s->data, a, &part, &s->rows, j, expanded, &s->ahead);
        for (int64_t i = 0; i < t->lines; i++) {
            const int32_t from = t->first[i] - (int32_t)j, to = t->last[i] - (int32_t)j;
            s->from[i] = from > s->rows.from ? from : s->rows.from;
            s->to[i] = to < s->rows.to ? to : s->rows.to;
        }
        attend(s, a, t, blocks);
    }
}

/* (M, L, out) <- the union of it and the partial (m, l, acc). Not inlined, see `weights`. */
static __attribute__((noinline)) void merge(float *out, float *M, float *L, const float *acc, float m,
                                            float l, int64_t padded) {
    if (l == 0.0f) return; /* saw nothing in this split */
    if (*L == 0.0f) {
        memcpy(out, acc, (size_t)padded * sizeof(float));
        *M = m, *L = l;
        return;
    }
    const float max = *M > m ? *M : m;
    float power[W] = {*M - max, m - max};
    vf_store(power, vf_exp2(vf_load(power)));
    for (int64_t d = 0; d < padded; d += W) {
        const vf had = vf_mul(vf_load(out + d), vf_set(power[0]));
        vf_store(out + d, vf_fma(vf_load(acc + d), vf_set(power[1]), had));
    }
    *L = *L * power[0] + l * power[1];
    *M = max;
}

/* Head h of a token, from its sum of weighted values, which may be overwritten. */
static void finish(const attention *a, int64_t token, int64_t h, float *merged, float L) {
    const int64_t width = a->q_heads * a->dim, D = a->dim;
    const vf scale = vf_set(1.0f / L);
    float *out = a->out ? a->out + token * width + h * D : merged;
    for (int64_t d = 0; d < D; d += W)
        vf_store_n(out + d, vf_mul(vf_load(merged + d), scale), D - d < W ? (int)(D - d) : W);
    if (a->row8)
        quantize_groups(a->row8 + token * ae_row8_bytes(width, a->row8_group), out, width, a->row8_group, h * D,
                        (h + 1) * D);
}

#undef VECTORS
#undef LINES
#undef NOINLINE
#undef BLOCK
#undef BLOCKS
#undef BATCH
#undef CODE_LINES
#undef FETCHES
