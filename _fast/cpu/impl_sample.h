/* The sampler. No row is sorted: top-k and top-p bisect for the smallest logit they keep.
 *
 * Every row is drawn by one thread, in one order, so results depend on nothing but the row. Plain loops
 * here are written so that the compiler vectorizes them: integers, or no reduction.
 */
#pragma once
#include <stdlib.h>

#include "sample.h"
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

/* The largest of x; NaN unless it is finite and no element is NaN. */
static float largest(const float *x, int64_t n) {
    int32_t lo = KEY_INF, hi = KEY_MINUS_INF;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = key_of(x[i]);
        lo = key < lo ? key : lo;
        hi = key > hi ? key : hi;
    }
    return lo < KEY_MINUS_INF || hi >= KEY_INF || hi == KEY_MINUS_INF ? NAN : key_value(hi);
}

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
static float kth_largest(const float *x, int64_t n, int64_t k, float max) {
    int64_t lo = KEY_MINUS_INF, hi = (int64_t)key_of(max) + 1; /* count(lo) >= k > count(hi) */
    while (hi - lo > 1) {
        int64_t mid = lo + (hi - lo) / 2;
        if (count_at_least(x, n, key_value(mid)) >= k) lo = mid;
        else hi = mid;
    }
    return key_value(lo);
}

/* w = exp(y - max); n in whole blocks. Returns the sum, accurate also over large vocabularies. */
static double weigh(float *w, const float *y, int64_t n, float max) {
    const vf shift = vf_set(max);
    double total = 0;
    for (int64_t base = 0; base < n; base += 4096) {
        int64_t end = base + 4096 < n ? base + 4096 : n;
        vf sum = vf_zero();
        for (int64_t i = base; i < end; i += W) {
            vf e = vf_exp(vf_sub(vf_load(y + i), shift));
            vf_store(w + i, e);
            sum = vf_add(sum, e);
        }
        total += vf_sum(sum);
    }
    return total;
}

/* The sum of w where y >= cut. */
static double mass_at_least(const float *y, const float *w, int64_t n, float cut) {
    const vf least = vf_set(cut);
    double total = 0;
    for (int64_t base = 0; base < n; base += 4096) {
        int64_t end = base + 4096 < n ? base + 4096 : n;
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

static void keep_top_k(const float *y, float *w, int64_t n, int64_t k, float max) {
    float cut = kth_largest(y, n, k, max);
    keep(y, w, n, cut, k - count_at_least(y, n, key_value((int64_t)key_of(cut) + 1)));
}

/* Copies the y and w of ids with w > least, in order, and fills the last block; at most `room` floats each.
 * Returns their number in whole blocks, or 0 if there is no room. */
static int64_t gather(const float *y, const float *w, int64_t n, float least, float *few_y, float *few_w,
                      int64_t room) {
    enum { BLOCK = 64 };
    int64_t found = 0;
    for (int64_t base = 0; base < n; base += BLOCK) {
        int any = 0;
        for (int j = 0; j < BLOCK; j++) any |= w[base + j] > least;
        if (!any) continue;
        if (found + 2 * BLOCK > room) return 0;
        for (int64_t i = base; i < base + BLOCK; i++) {
            few_y[found] = y[i];
            few_w[found] = w[i];
            found += w[i] > least;
        }
    }
    for (; found % BLOCK; found++) few_y[found] = -INFINITY, few_w[found] = 0.0f;
    return found;
}

/* `scratch` has AE_SCRATCH bytes. */
static void keep_top_p(const float *y, float *w, int64_t n, double p, float max, float *scratch) {
    const int64_t room = (int64_t)(AE_SCRATCH / sizeof(float) / 2);
    const double total = mass_at_least(y, w, n, -INFINITY);
    /* All ids that weigh less than an n-th of what may be left out can be left out together. */
    int64_t m = gather(y, w, n, (float)((1 - p) * total / (double)n * 0.999), scratch, scratch + room, room);
    const float *few_y = m ? scratch : y, *few_w = m ? scratch + room : w;
    m = m ? m : n;
    const double most = mass_at_least(few_y, few_w, m, -INFINITY);
    const double target = p * total < most ? p * total : most;
    int64_t lo = KEY_MINUS_INF, hi = (int64_t)key_of(max) + 1; /* mass(lo) >= target > mass(hi) = 0 */
    while (hi - lo > 1) {
        int64_t mid = lo + (hi - lo) / 2;
        if (mass_at_least(few_y, few_w, m, key_value(mid)) >= target) lo = mid;
        else hi = mid;
    }
    const float cut = key_value(lo);
    const double missing = target - mass_at_least(few_y, few_w, m, key_value(lo + 1));
    const double ties = ceil(missing / few_w[first_equal(few_y, m, cut)]);
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

/* Since -log u >= 1 - u, an id can only beat `best` if 1 - u <= exp(y - best) = w exp(max - best): the
 * two logarithms are computed for the few ids that pass, and no noise at all where no u could. */
static int32_t draw(const float *y, const float *w, int64_t n, float max, float min_p, uint64_t key) {
    enum { BLOCK = 64 };
    double best = -INFINITY;
    int32_t token = -1;
    float factor = 17.4f; /* the largest logit has w = 1 and noise above -log(17.4) */
    for (int64_t base = 0; base < n; base += BLOCK) {
        float odds[BLOCK], rest[BLOCK];
        int hopeful = 0, passed = 0;
        for (int j = 0; j < BLOCK; j++) {
            float weight = w[base + j];
            odds[j] = weight >= min_p ? weight * factor : 0.0f;
            hopeful |= odds[j] > 0x1p-26f;
        }
        if (!hopeful) continue;
        for (int j = 0; j < BLOCK; j++)
            rest[j] = ((float)(0x1000000 - (int32_t)noise_bits(key, base + j)) - 0.5f) * 0x1p-24f;
        for (int j = 0; j < BLOCK; j++) passed |= rest[j] <= odds[j];
        if (!passed) continue;
        for (int j = 0; j < BLOCK; j++) {
            if (!(rest[j] <= odds[j])) continue;
            double u = (noise_bits(key, base + j) + 0.5) * 0x1p-24;
            double score = (double)y[base + j] - log(-log(u));
            if (score <= best) continue;
            best = score;
            token = (int32_t)(base + j);
            float bound = expf((float)(max - best)) * 1.0001f; /* covers the rounding of w */
            factor = bound < factor ? bound : factor;
        }
    }
    return token;
}

static int by_rank(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* The n largest of x with their logprobs, into the row's top ids. */
static void list_top(const ae_sample *a, int64_t s, const float *x, int64_t n, float max, double log_total,
                     uint64_t *order) {
    int32_t *ids = a->top_ids + s * a->max_logprobs;
    float *logprobs = a->top_logprobs + s * a->max_logprobs;
    int64_t wanted = n < a->vocab ? n : a->vocab, found = 0;
    for (int64_t i = 0; i < n; i++) ids[i] = -1, logprobs[i] = -INFINITY;
    if (wanted < 1) return;
    float cut = kth_largest(x, a->vocab, wanted, max);
    int64_t ties = wanted - count_at_least(x, a->vocab, key_value((int64_t)key_of(cut) + 1));
    for (int64_t i = 0; i < a->vocab; i++) {
        if (x[i] < cut || (x[i] == cut && --ties < 0)) continue;
        uint64_t descending = (uint64_t)((int64_t)KEY_INF - key_of(x[i] + 0.0f));
        order[found++] = descending << 32 | (uint64_t)i;
    }
    qsort(order, (size_t)found, sizeof *order, by_rank);
    for (int64_t i = 0; i < found; i++) {
        ids[i] = (int32_t)(order[i] & 0xffffffff);
        logprobs[i] = (float)((double)x[ids[i]] - log_total);
    }
}

static int32_t rank_of(const float *x, int64_t n, int32_t token) {
    int32_t rank = 1;
    const float value = x[token];
    for (int64_t i = 0; i < n; i++) rank += x[i] > value;
    for (int64_t i = 0; i < token; i++) rank += x[i] == value;
    return rank;
}

/* The value of an option for row s. */
#define OPTION(name, otherwise) (a->name ? a->name[s] : (otherwise))

/* Penalties and bans, on a copy of the row's logits. */
static void penalize(const ae_sample *a, int64_t s, float *y) {
    const int32_t *counts = (const int32_t *)(uintptr_t)OPTION(counts, 0);
    const uint8_t *prompt = (const uint8_t *)(uintptr_t)OPTION(prompt_mask, 0);
    const float r = OPTION(repetition, 1.0f), f = OPTION(frequency, 0.0f), p = OPTION(presence, 0.0f);
    if (r != 1.0f && (counts || prompt)) {
        for (int64_t i = 0; i < a->vocab; i++) {
            int seen = (prompt && prompt[i]) || (counts && counts[i] > 0);
            y[i] = !seen ? y[i] : y[i] > 0.0f ? y[i] / r : y[i] * r;
        }
    }
    if ((f != 0.0f || p != 0.0f) && counts) {
        for (int64_t i = 0; i < a->vocab; i++) y[i] -= f * (float)counts[i] + (counts[i] > 0 ? p : 0.0f);
    }
    if (!a->banned_start) return;
    for (int32_t i = a->banned_start[s]; i < a->banned_start[s + 1]; i++)
        if (a->banned[i] >= 0 && a->banned[i] < a->vocab) y[a->banned[i]] = -INFINITY;
}

static int has_changes(const ae_sample *a, int64_t s) {
    return OPTION(counts, 0) || OPTION(prompt_mask, 0) ||
           (a->banned_start && a->banned_start[s] != a->banned_start[s + 1]);
}

/* A copy of x, followed by -inf up to whole blocks. */
static void copy_row(float *y, const float *x, int64_t vocab, int64_t padded) {
    memcpy(y, x, (size_t)vocab * sizeof *y);
    for (int64_t i = vocab; i < padded; i++) y[i] = -INFINITY;
}

/* One row's token, or -1; `max` is its largest logit. y and w are this thread's, of `padded` floats. */
static int32_t draw_row(const ae_sample *a, int64_t s, const float *x, float max, float *y, float *w,
                        int64_t padded, float *scratch) {
    const int64_t V = a->vocab;
    const float temperature = OPTION(temperature, 0.0f);
    const int greedy = temperature < AE_GREEDY, changes = has_changes(a, s);
    if (greedy && !changes) return first_equal(x, V, max);
    copy_row(y, x, V, padded);
    if (changes) {
        penalize(a, s, y);
        max = largest(y, V);
        if (isnan(max)) return -1;
    }
    if (greedy) return first_equal(y, V, max);
    for (int64_t i = 0; i < V; i++) y[i] /= temperature;
    max /= temperature;
    weigh(w, y, padded, max);
    const int64_t k = OPTION(top_k, 0);
    if (k > 0 && k < V) keep_top_k(y, w, padded, k, max);
    const float p = OPTION(top_p, 1.0f);
    if (p < 1.0f) keep_top_p(y, w, padded, p, max, scratch);
    const uint64_t key = mix64(OPTION(seed, 0) + NOISE_STEP * ((uint64_t)OPTION(position, 0) + 1));
    return draw(y, w, padded, max, OPTION(min_p, 0.0f), key);
}

/* Logprobs of row s, whose drawn token is `token` and whose largest logit is `max`. */
static void report(const ae_sample *a, int64_t s, const float *x, float max, int32_t token, float *y, float *w,
                   int64_t padded) {
    const int64_t n = OPTION(num_logprobs, -1);
    if (n < 0) return;
    if (token < 0) {
        a->logprob[s] = NAN;
        a->rank[s] = 0;
        for (int64_t i = 0; i < n; i++) a->top_ids[s * a->max_logprobs + i] = -1;
        for (int64_t i = 0; i < n; i++) a->top_logprobs[s * a->max_logprobs + i] = NAN;
        return;
    }
    copy_row(y, x, a->vocab, padded);
    const double log_total = (double)max + log(weigh(w, y, padded, max));
    a->logprob[s] = (float)((double)x[token] - log_total);
    a->rank[s] = rank_of(x, a->vocab, token);
    list_top(a, s, x, n, max, log_total, (uint64_t *)y); /* y and w together hold one of these per id */
}

static void k_sample(const ae_sample *a, const ae_thread *thread) {
    const int64_t V = a->vocab, padded = ae_sample_padded(V);
    float *y = a->workspace + thread->tid * 2 * padded, *w = y + padded;
    for (int64_t s; (s = ae_next(thread, a->rows, 1)) >= 0;) {
        const float *x = a->logits + s * V;
        const float max = largest(x, V);
        const int32_t token = isnan(max) ? -1 : draw_row(a, s, x, max, y, w, padded, thread->scratch);
        a->tokens[s] = token;
        report(a, s, x, max, token, y, w, padded);
    }
}

#undef OPTION
