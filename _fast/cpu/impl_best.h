/* Floats in order, and the k best of a row, found while it passes by (head.h). */
#pragma once
#include "head.h"
#include "simd.h"

/* Floats as integers in the same order. NaNs fall outside [KEY_MINUS_INF, KEY_INF]; -0 just below 0. */
#define KEY_INF 0x7f800000
#define KEY_MINUS_INF ((int32_t)0x807fffff)

static inline int32_t key_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float key_value(int64_t key) {
    int32_t bits = (int32_t)key;
    bits ^= (bits >> 31) & 0x7fffffff;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* A value and its id in one word: larger values first, then lower ids. -0 counts as 0. */
static inline uint64_t word_of(float y, int64_t id) {
    return (uint64_t)((int64_t)KEY_INF - key_of(y + 0.0f)) << 32 | (uint64_t)id;
}

static inline int32_t word_id(uint64_t word) { return (int32_t)(word & 0xffffffff); }
static inline float word_value(uint64_t word) { return key_value((int64_t)KEY_INF - (int64_t)(word >> 32)); }

static inline void best_clear(ae_best *b) {
    b->count = 0;
    b->bound = -INFINITY;
}

/* Whether the word entered. */
static int best_insert(ae_best *b, uint64_t word, int k) {
    if (b->count == k && word > b->words[k - 1]) return 0;
    int i = b->count < k ? b->count++ : k - 1;
    for (; i > 0 && b->words[i - 1] > word; i--) b->words[i] = b->words[i - 1];
    b->words[i] = word;
    return 1;
}

/* Takes x [n], whose ids start at `id`, into the k best of x / divisor. -inf does not enter; the first NaN or
 * +inf makes the row unusable. */
static void best_take(ae_best *b, const float *x, int64_t n, int64_t id, int k, float divisor) {
    if (b->count < 0) return;
    vf bound = vf_set(b->bound);
    for (int64_t i = 0; i < n; i += W) {
        const int many = n - i >= W;
        unsigned hits = vf_not_below(many ? vf_load(x + i) : vf_load_n(x + i, (int)(n - i)), bound);
        if (!many) hits &= (1u << (n - i)) - 1;
        if (!hits) continue;
        for (; hits; hits &= hits - 1) {
            const int64_t j = i + __builtin_ctz(hits);
            const float y = x[j] / divisor;
            if (!(y < INFINITY)) {
                b->count = -1;
                return;
            }
            if (y == -INFINITY || !best_insert(b, word_of(y, id + j), k) || b->count < k) continue;
            /* What comes now must not be less than the least y: its ids may be lower. x that give a greater y
             * than the one below are all at least that one's product, rounded or not. */
            b->bound = nextafterf(word_value(b->words[k - 1]), -INFINITY) * divisor;
        }
        bound = vf_set(b->bound);
    }
}

/* Takes the best of other elements of the same row. */
static void best_merge(ae_best *b, const ae_best *other, int k) {
    if (other->count < 0) b->count = -1;
    if (b->count < 0) return;
    for (int i = 0; i < other->count; i++)
        if (!best_insert(b, other->words[i], k)) return;
}
