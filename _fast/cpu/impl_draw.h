/* Choosing among the elements that are left: what top-k, top-p and min-p keep, and the draw (sample.h).
 *
 * No list is sorted: top-k and top-p bisect for the smallest value they keep. Plain loops here are written
 * so that the compiler vectorizes them: integers, or no reduction.
 */
#pragma once
#include "impl_best.h"
#include "sample.h"

#define BLOCK 64

static int32_t first_equal(const float *x, int64_t n, float value) {
    int32_t first = INT32_MAX;
    for (int32_t i = 0; i < (int32_t)n; i++) {
        int32_t candidate = x[i] == value ? i : INT32_MAX;
        first = candidate < first ? candidate : first;
    }
    return first;
}

static int64_t count_at_least(const float *x, int64_t n, float cut) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; i++) count += x[i] >= cut;
    return count;
}

/* The k-th largest of x, 1 <= k <= n. */
static float kth_largest(const float *x, int64_t n, int64_t k) {
    int64_t lo = KEY_MINUS_INF, hi = KEY_INF; /* count(lo) >= k > count(hi) */
    while (hi - lo > 1) {
        int64_t mid = lo + (hi - lo) / 2;
        if (count_at_least(x, n, key_value(mid)) >= k) lo = mid;
        else hi = mid;
    }
    return key_value(lo);
}

/* w = exp(y - max); n in whole blocks. */
static void weigh(float *w, const float *y, int64_t n, float max) {
    const vf shift = vf_set(max);
    for (int64_t i = 0; i < n; i += W) vf_store(w + i, vf_exp(vf_sub(vf_load(y + i), shift)));
}

/* The sum of w where y >= cut, accurate also over large vocabularies. */
static double mass_at_least(const float *y, const float *w, int64_t n, float cut) {
    const vf least = vf_set(cut);
    double total = 0;
    for (int64_t base = 0; base < n; base += AE_STRIP) {
        int64_t end = base + AE_STRIP < n ? base + AE_STRIP : n;
        vf sum = vf_zero();
        for (int64_t i = base; i < end; i += W) {
            __auto_type above = vf_load(y + i) >= least;
            sum = vf_add(sum, (vf)(above & (__typeof__(above))vf_load(w + i)));
        }
        total += vf_sum(sum);
    }
    return total;
}

/* Sets w to 0, which takes an id out of the draw, below the cut and for all but the first `ties` at it. */
static void keep(const float *y, float *w, int64_t n, float cut, int64_t ties) {
    int32_t at_cut = 0;
    for (int64_t i = 0; i < n; i++) {
        w[i] = y[i] < cut ? 0.0f : w[i];
        at_cut += y[i] == cut;
    }
    if (at_cut <= ties) return;
    for (int64_t i = 0; i < n; i++)
        if (y[i] == cut && w[i] > 0.0f && --ties < 0) w[i] = 0.0f;
}

static void keep_top_k(const float *y, float *w, int64_t n, int64_t k) {
    float cut = kth_largest(y, n, k);
    keep(y, w, n, cut, k - count_at_least(y, n, key_value((int64_t)key_of(cut) + 1)));
}

/* Keeps what holds `target` of the mass, or all if that is less. */
static void keep_top_p(const float *y, float *w, int64_t n, double target, float max) {
    const double most = mass_at_least(y, w, n, -INFINITY);
    if (target > most) target = most;
    int64_t lo = KEY_MINUS_INF, hi = (int64_t)key_of(max + 0.0f) + 1; /* mass(lo) >= target > mass(hi) = 0 */
    while (hi - lo > 1) {
        int64_t mid = lo + (hi - lo) / 2;
        if (mass_at_least(y, w, n, key_value(mid)) >= target) lo = mid;
        else hi = mid;
    }
    const float cut = key_value(lo);
    const double missing = target - mass_at_least(y, w, n, key_value(lo + 1));
    const double ties = ceil(missing / w[first_equal(y, n, cut)]);
    keep(y, w, n, cut, ties >= 1 ? (ties < (double)n ? (int64_t)ties : n) : 1);
}

static inline uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

#define NOISE_STEP 0x9E3779B97F4A7C15u

static inline uint32_t noise_bits(uint64_t key, int64_t id) {
    return (uint32_t)(mix64(key + NOISE_STEP * ((uint64_t)id + 1)) >> 40);
}

/* The winner so far. */
typedef struct pick {
    double score;
    int32_t token;
    float factor; /* see pick_block */
} pick;

/* The largest logit has w = 1, and noise is above -log(17.4). */
static pick pick_none(void) { return (pick){-INFINITY, -1, 17.4f}; }

static void pick_better(pick *p, double score, int32_t token) {
    if (score < p->score || (score == p->score && (token > p->token || p->token < 0))) return;
    p->score = score;
    p->token = token;
}

/* A block of elements x, y = x / temperature, with weights w = exp(y - max) and ids. Weights may be off by
 * 1e-5 of themselves; those of 0 are out.
 *
 * Since -log u >= 1 - u, an id can only beat `score` if 1 - u <= exp(y - score) = w exp(max - score): the two
 * logarithms are computed for the few ids that pass, and no noise at all where no u could. */
static void pick_block(pick *p, const float *x, float temperature, float max, const float *w,
                       const int32_t *ids, uint64_t key) {
    float odds[BLOCK], rest[BLOCK];
    int hopeful = 0, passed = 0;
    for (int j = 0; j < BLOCK; j++) {
        odds[j] = w[j] * p->factor;
        hopeful |= odds[j] > 0x1p-26f;
    }
    if (!hopeful) return;
    for (int j = 0; j < BLOCK; j++)
        rest[j] = ((float)(0x1000000 - (int32_t)noise_bits(key, ids[j])) - 0.5f) * 0x1p-24f;
    for (int j = 0; j < BLOCK; j++) passed |= rest[j] <= odds[j];
    if (!passed) return;
    for (int j = 0; j < BLOCK; j++) {
        if (!(rest[j] <= odds[j])) continue;
        const double u = (noise_bits(key, ids[j]) + 0.5) * 0x1p-24;
        pick_better(p, (double)(x[j] / temperature) - log(-log(u)), ids[j]);
        const float bound = expf((float)(max - p->score)) * 1.0001f; /* covers the rounding of w */
        p->factor = bound < p->factor ? bound : p->factor;
    }
}

/* The value of an option for row s. */
#define OPTION(name, otherwise) (a->name ? a->name[s] : (otherwise))

static uint64_t noise_key(const ae_sample *a, int64_t s) {
    return mix64(OPTION(seed, 0) + NOISE_STEP * ((uint64_t)OPTION(position, 0) + 1));
}

/* Draws from what top-k has left: the best of y, in order. */
static int32_t draw_best(const ae_sample *a, int64_t s, const ae_best *best) {
    if (best->count < 1) return -1;
    if (best->count == 1 || OPTION(temperature, 0.0f) < AE_GREEDY) return word_id(best->words[0]);
    float y[AE_BEST], w[AE_BEST];
    int32_t ids[AE_BEST];
    double total = 0, mass = 0;
    for (int i = 0; i < AE_BEST; i++) {
        y[i] = i < best->count ? word_value(best->words[i]) : -INFINITY;
        ids[i] = i < best->count ? word_id(best->words[i]) : 0;
    }
    weigh(w, y, AE_BEST, y[0]);
    for (int i = 0; i < best->count; i++) total += w[i];
    const double p = OPTION(top_p, 1.0f), target = p < 1.0 ? p * total : INFINITY;
    const float least = OPTION(min_p, 0.0f);
    for (int i = 0; i < AE_BEST; i++) {
        const float weight = w[i];
        if (mass >= target && i > 0) w[i] = 0.0f;
        if (weight < least) w[i] = 0.0f;
        mass += weight;
    }
    pick winner = pick_none();
    pick_block(&winner, y, 1.0f, y[0], w, ids, noise_key(a, s));
    return winner.token;
}
