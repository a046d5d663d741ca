/* Attention on an int8 cache in integers, where the processor has their dot product: keys and values are taken
 * as they are, and queries as quantized rows (quantized.h). A weight, at most 1, times the scale of its value is a
 * multiple of 1/65535 of the largest scale that the line sees in the tile, whatever else is there: its high and low
 * bytes are multiplied apart. (With 8 bits the many small weights of a tile would be lost beside a large one.) Sums
 * are exact until a tile ends.
 */
#pragma once
#include "attention_scratch.h"
#include "impl_quantize.h"

#if defined(INT_DOT)
/* Lines of a register block where each has sums of high and of low parts. */
#define CODE_LINES (LINES / 2)

AE_INLINE signed4 four_codes(const void *codes) {
    int32_t word;
    memcpy(&word, codes, sizeof word);
    return signed4_set(word);
}

static void quantize_queries(attention_scratch *s, const attention *a, const line_tile *t) {
    const int64_t bytes = ae_row8_bytes(a->dim, AE_WHOLE);
    for (int64_t i = 0; i < t->lines; i++) quantize_bytes(s->queries.codes + i * bytes, t->query[i], a->dim);
}

/* As score_at(). */
AE_INLINE void score_codes_at(int lines, int vectors, attention_scratch *s, const attention *a, int64_t line,
                              int64_t i) {
    const int64_t dim = a->dim, bytes = ae_row8_bytes(dim, AE_WHOLE);
    const int8_t *rows = s->queries.codes + line * bytes, *query = rows;
    const float *key = s->data.keys + i;
    vi sum[LINES][VECTORS];
    /* Keys are 128 more than they should be. */
    EACH(r, lines) EACH(k, vectors) sum[r][k] = vi_set(-128 * *ae_row8_sums(rows + r * bytes, dim, AE_WHOLE));
    pace turn = pace_of(dim / 4);
    for (int64_t words = (dim + 3) / 4; words > 0; words--, query += 4, key += TILE_KEYS) {
        codes column[VECTORS];
        EACH(k, vectors) column[k] = codes_of(vi_load(key + k * W));
        fetch_in_turn(&s->ahead, &turn);
        EACH(r, lines) {
            const signed4 q = four_codes(query + r * bytes);
            EACH(k, vectors) sum[r][k] = dot(sum[r][k], column[k], q);
        }
    }
    EACH(r, lines) {
        const vf scale = vf_set(*ae_row8_scales(rows + r * bytes, dim, AE_WHOLE));
        EACH(k, vectors)
            vf_store(s->scores + (line % BATCH + r) * TILE_KEYS + i + k * W,
                     vf_mul(vi_to_vf(sum[r][k]), vf_mul(vf_load(s->data.key_scale + i + k * W), scale)));
    }
}

/* A line's weights for a tile of keys, in the place of its scores. */
typedef struct code_weights {
    uint8_t high[TILE_KEYS], low[TILE_KEYS];
    float scale;
} code_weights;

AE_INLINE code_weights *weights_of(attention_scratch *s, int64_t line) {
    return (code_weights *)(s->scores + line % BATCH * TILE_KEYS);
}

/* Has `units` tell how many there are in a weight of 1 for every position in [from, to) of the tile. */
static __attribute__((noinline)) void find_units(weight_units *u, const float *scales, int32_t from, int32_t to) {
    vi peaks = peak_zero();
    memset(u->of, 0, sizeof u->of); /* of what is not seen */
    memcpy(u->of + from, scales + from, (size_t)(to - from) * sizeof(float));
    EACH(i, TILE_KEYS / W) peaks = peak_max(peaks, vf_load(u->of + i * W));
    const float peak = ae_bits_f32((uint32_t)peak_of(peaks));
    const int none = peak < 0x1p-100f; /* a NaN is something */
    const vf inverse = vf_set(none ? 0.0f : 65535 / peak);
    EACH(i, TILE_KEYS / W) vf_store(u->of + i * W, vf_mul(vf_load(u->of + i * W), inverse));
    u->unit = none ? 0.0f : peak / 65535;
    u->from = from;
    u->to = to;
}

/* acc[d .. d + vectors * W) = factor * acc + sum over the quads [from, to) of weight * value. */
AE_INLINE void accumulate_codes_at(int lines, int vectors, attention_scratch *s, int64_t padded, int64_t line,
                                   int64_t d, int64_t from, int64_t to) {
    const code_weights *weights[CODE_LINES];
    const float *value = s->data.values + from * padded + d;
    vi sum[CODE_LINES][2][VECTORS];
    pace turn = pace_of(TILE_KEYS / 4);
    EACH(r, lines) weights[r] = weights_of(s, line + r);
    EACH(r, lines) EACH(part, 2) EACH(k, vectors) sum[r][part][k] = vi_set(0);
    for (int64_t quad = from; quad < to; quad++, value += padded) {
        vi v[VECTORS];
        if (d == 0) fetch_in_turn(&s->ahead, &turn);
        EACH(k, vectors) v[k] = vi_load(value + k * W);
        EACH(r, lines) EACH(part, 2) {
            const signed4 w = four_codes((part ? weights[r]->low : weights[r]->high) + 4 * quad);
            EACH(k, vectors) sum[r][part][k] = dot_signed(sum[r][part][k], v[k], w);
        }
    }
    EACH(r, lines) {
        float *acc = s->acc + (line + r) * padded + d;
        const vf factor = vf_set(s->factor[line + r]), scale = vf_set(weights[r]->scale);
        EACH(k, vectors) {
            const vf y = vf_fma(vi_to_vf(sum[r][0][k]), vf_set(256), vi_to_vf(sum[r][1][k]));
            vf_store(acc + k * W, vf_fma(y, scale, vf_mul(vf_load(acc + k * W), factor)));
        }
    }
}

/* Weights of what a line does not see are zeros: one range does for all lines. */
AE_INLINE void accumulate_codes(int lines, attention_scratch *s, const attention *a, int64_t line) {
    int64_t from = TILE_KEYS, to = 0, d = 0;
    EACH(r, lines) {
        if (s->from[line + r] >= s->to[line + r]) continue;
        from = s->from[line + r] < from ? s->from[line + r] : from;
        to = s->to[line + r] > to ? s->to[line + r] : to;
    }
    from = from / 4;
    to = (to + 3) / 4;
    for (; d + VECTORS * W <= a->padded; d += VECTORS * W)
        accumulate_codes_at(lines, VECTORS, s, a->padded, line, d, from, to);
    for (; d < a->padded; d += W) accumulate_codes_at(lines, 1, s, a->padded, line, d, from, to);
}
#endif
