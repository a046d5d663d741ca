/* The sampler's rows. Few logits are ever copied: the passes over a row read the logits themselves and
 * gather the few that can be drawn.
 *
 * A row has one thread, or, where there are fewer rows than threads, all of them: each takes a part of the
 * vocabulary, in whole strips, and the row's first thread, the leader, draws from what they found. What is
 * added up is added strip by strip, so results depend on nothing but the row.
 */
#pragma once
#include <float.h>
#include <stdlib.h>

#include "impl_draw.h"

/* What one thread finds in its part of a row. */
typedef struct desk {
    float max;    /* NaN: the row is unusable */
    int32_t rank; /* elements ahead of the drawn token */
    pick pick;
    int64_t found; /* elements in x, ids */
    ae_best best;
    /* The row's, at the leader's desk. */
    int32_t token;
    int again; /* the elements found are too few */
} desk;

_Static_assert(sizeof(desk) <= AE_DESK_HEADER, "AE_DESK_HEADER is too small");

typedef struct row {
    const ae_sample *a;
    const ae_thread *thread;
    int64_t s;
    int first, size; /* the threads that share the row */
    int64_t lo, hi;  /* this thread's part of the vocabulary */
    const float *x;  /* [vocab] logits, changed by penalties and bans */
    float temperature;
} row;

static desk *desk_of(const row *r, int member) {
    return (desk *)(r->a->workspace + (size_t)(r->first + member) * ae_desk_bytes(r->a->vocab));
}
static desk *own_desk(const row *r) { return desk_of(r, r->thread->tid - r->first); }
static int is_leader(const row *r) { return r->thread->tid == r->first; }

/* A desk's arrays, see ae_desk_bytes: a changed row; weights, elements and ids that were found. */
static float *copy_at(desk *d) { return (float *)((char *)d + AE_DESK_HEADER); }
static float *w_at(const row *r, desk *d) { return copy_at(d) + ae_sample_padded(r->a->vocab); }
static float *x_at(const row *r, desk *d) { return w_at(r, d) + ae_sample_padded(r->a->vocab); }
static int32_t *ids_at(const row *r, desk *d) {
    return (int32_t *)x_at(r, d) + ae_sample_padded(r->a->vocab);
}
/* Of the leader's: largest elements of runs, sums of strips. */
static float *peaks_of(const row *r) {
    return (float *)ids_at(r, desk_of(r, 0)) + ae_sample_padded(r->a->vocab);
}
static double *masses_of(const row *r) {
    return (double *)(peaks_of(r) + ae_sample_padded(r->a->vocab / 16));
}

static void meet(const row *r) {
    if (r->size > 1) ae_barrier(r->thread);
}

/* Elements of which the largest ones make one vector of peaks. */
#define PEAK_RUN (16 * W)

/* The largest of x [n], NaN if there is a NaN or +inf; `peaks` takes those of whole runs. */
static float survey(const float *x, int64_t n, float *peaks) {
    vf max = vf_set(-INFINITY);
    unsigned bad = 0;
    int64_t i = 0;
    for (; n - i >= PEAK_RUN; i += PEAK_RUN) {
        vf peak = vf_set(-INFINITY);
        for (int64_t j = i; j < i + PEAK_RUN; j += W) {
            const vf v = vf_load(x + j);
            bad |= vf_not_below(v, vf_set(INFINITY));
            peak = vf_max(peak, v);
        }
        vf_store(peaks + i / 16, peak);
        max = vf_max(max, peak);
    }
    float largest = vf_hmax(max);
    for (; i < n; i++) {
        bad |= !(x[i] < INFINITY);
        largest = x[i] > largest ? x[i] : largest;
    }
    return bad ? NAN : largest;
}

/* The largest element of x [vocab], NaN if it is unusable. Fills the peaks. */
static float survey_row(const row *r, const float *x) {
    own_desk(r)->max = survey(x + r->lo, r->hi - r->lo, peaks_of(r) + r->lo / 16);
    meet(r);
    float max = -INFINITY;
    for (int t = 0; t < r->size && !isnan(max); t++) {
        const float part = desk_of(r, t)->max;
        if (!(part <= max)) max = part;
    }
    return max == -INFINITY ? NAN : max;
}

/* A bound that at least k elements reach, little above the k-th largest: the k-th largest peak. */
static float bound_of_count(const row *r, int64_t k) {
    const int64_t peaks = r->a->vocab / PEAK_RUN * W;
    return k < 1 || k > peaks ? -INFINITY : kth_largest(peaks_of(r), peaks, k);
}

/* A bound that every x reaches whose exp(y - max) is at least `weight`. */
static float bound_of_weight(const row *r, float max, double weight) {
    if (!(weight > 0)) return -INFINITY;
    const double t = r->temperature, bound = (max + log(weight)) * t;
    return (float)(bound - 1e-5 * (t + fabs(bound) + fabs(max * t)));
}

/* Block of x [n] from i on; what is past the end is -inf. */
static const float *block_at(const float *x, int64_t i, int64_t n, float *tail) {
    if (n - i >= BLOCK) return x + i;
    for (int64_t j = 0; j < BLOCK; j++) tail[j] = i + j < n ? x[i + j] : -INFINITY;
    return tail;
}

/* exp(x / t - max) for less than the price of a division: x / t is off by an ulp at times. */
AE_INLINE vf weight_of(vf x, float t, float max) {
    const vf inverse = vf_set(1.0f / t);
    const vf q = vf_mul(x, inverse), y = vf_fma(vf_fma(q, vf_set(-t), x), inverse, q);
    return vf_exp(vf_sub(vf_max(y, vf_set(-FLT_MAX)), vf_set(max))); /* -inf has become a NaN */
}

/* Sums exp(x / temperature - max) over the strips of this thread's part. */
static void weigh_strips(const row *r, const float *x, float temperature, float max) {
    float tail[BLOCK];
    for (int64_t i = r->lo; i < r->hi;) {
        double *mass = masses_of(r) + i / AE_STRIP;
        const int64_t end = r->hi - i < AE_STRIP ? r->hi : i + AE_STRIP;
        vf sum = vf_zero();
        for (; i < end; i += BLOCK) {
            const float *block = block_at(x, i, end, tail);
            for (int64_t j = 0; j < BLOCK; j += W)
                sum = vf_add(sum, weight_of(vf_load(block + j), temperature, max));
        }
        *mass = vf_sum(sum);
    }
}

/* What weigh_strips found, once the threads have met. */
static double total_mass(const row *r) {
    double total = 0;
    for (int64_t i = 0; i * AE_STRIP < r->a->vocab; i++) total += masses_of(r)[i];
    return total;
}

/* Lists the elements of x, in this thread's part, that are not below the bound. */
static void gather(const row *r, const float *x, float bound) {
    desk *d = own_desk(r);
    float *few = x_at(r, d);
    int32_t *ids = ids_at(r, d);
    int64_t found = 0;
    for (int64_t i = r->lo; i < r->hi; i += W) {
        const int64_t n = r->hi - i;
        unsigned hits = vf_not_below(n >= W ? vf_load(x + i) : vf_load_n(x + i, (int)n), vf_set(bound));
        if (n < W) hits &= (1u << n) - 1;
        for (; hits; hits &= hits - 1, found++) {
            ids[found] = (int32_t)i + __builtin_ctz(hits);
            few[found] = x[ids[found]];
        }
    }
    d->found = found;
}

/* The leader's list of what all have gathered, in order of ids and filled up to whole blocks; its length. */
static int64_t join(const row *r) {
    desk *d = desk_of(r, 0);
    for (int t = 1; t < r->size; t++) {
        desk *other = desk_of(r, t);
        memcpy(x_at(r, d) + d->found, x_at(r, other), (size_t)other->found * 4);
        memcpy(ids_at(r, d) + d->found, ids_at(r, other), (size_t)other->found * 4);
        d->found += other->found;
    }
    const int64_t padded = ae_sample_padded(d->found);
    for (int64_t i = d->found; i < padded; i++) x_at(r, d)[i] = -INFINITY, ids_at(r, d)[i] = 0;
    return padded;
}

/* The draw from all elements: the winner of each part, then of these. */
static int32_t draw_all(const row *r, float max) {
    const uint64_t key = noise_key(r->a, r->s);
    float tail[BLOCK], w[BLOCK];
    int32_t ids[BLOCK];
    pick winner = pick_none();
    for (int64_t i = r->lo; i < r->hi; i += BLOCK) {
        const float *x = block_at(r->x, i, r->hi, tail);
        for (int64_t j = 0; j < BLOCK; j += W)
            vf_store(w + j, weight_of(vf_load(x + j), r->temperature, max));
        for (int32_t j = 0; j < BLOCK; j++) ids[j] = (int32_t)i + j;
        pick_block(&winner, x, r->temperature, max, w, ids, key);
    }
    own_desk(r)->pick = winner;
    meet(r);
    for (int t = 0; t < r->size; t++) {
        const pick *other = &desk_of(r, t)->pick;
        if (other->token >= 0) pick_better(&winner, other->score, other->token);
    }
    return winner.token;
}

/* How many elements are gathered first for top-p: where these do not hold its mass, more are. */
#define LIKELY 1024

/* The draw with top-k beyond AE_BEST, top-p or min-p; the token, at the leader. */
static int32_t draw_filtered(const row *r, int64_t k, float max) {
    const ae_sample *a = r->a;
    const int64_t s = r->s, peaks = a->vocab / 16;
    const double p = OPTION(top_p, 1.0f);
    const float min_p = OPTION(min_p, 0.0f);
    double target = INFINITY;
    float bound, safe;
    if (k) {
        bound = safe = bound_of_count(r, k);
    } else if (p < 1) {
        weigh_strips(r, r->x, r->temperature, max);
        meet(r);
        const double total = total_mass(r);
        /* All ids that weigh less than an n-th of what may be left out can be left out together. */
        const double left_out = (1 - p) * total / (double)a->vocab * 0.999;
        target = p * total;
        safe = bound_of_weight(r, max, left_out > min_p ? left_out : min_p);
        bound = bound_of_count(r, peaks / 4 < LIKELY ? peaks / 4 : LIKELY);
        if (bound < safe) bound = safe;
    } else {
        bound = safe = bound_of_weight(r, max, min_p);
    }
    desk *d = desk_of(r, 0);
    float *y = x_at(r, d), *w = w_at(r, d);
    for (int64_t m = 0;; bound = safe) {
        gather(r, r->x, bound);
        meet(r);
        if (is_leader(r)) {
            m = join(r);
            for (int64_t i = 0; i < m; i++) y[i] /= r->temperature;
            weigh(w, y, m, max);
            d->again = bound > safe && mass_at_least(y, w, m, -INFINITY) < target;
        }
        meet(r);
        if (d->again) continue;
        if (!is_leader(r)) return -1;
        if (k) keep_top_k(y, w, m, k);
        if (p < 1) keep_top_p(y, w, m, k ? p * mass_at_least(y, w, m, -INFINITY) : target, max);
        for (int64_t i = 0; i < m; i++) w[i] = w[i] < min_p ? 0.0f : w[i];
        pick winner = pick_none();
        for (int64_t i = 0; i < m; i += BLOCK)
            pick_block(&winner, y + i, 1.0f, max, w + i, ids_at(r, d) + i, noise_key(a, s));
        return winner.token;
    }
}

/* The draw from the k best. */
static int32_t draw_few(const row *r, int k) {
    ae_best *best = &own_desk(r)->best;
    best_clear(best);
    best_take(best, r->x + r->lo, r->hi - r->lo, r->lo, k, r->temperature);
    meet(r);
    if (!is_leader(r)) return -1;
    for (int t = 1; t < r->size; t++) best_merge(best, &desk_of(r, t)->best, k);
    return draw_best(r->a, r->s, best);
}

/* Penalties and bans, on a copy of the row's logits. */
static void penalize(const row *r, float *y) {
    const ae_sample *a = r->a;
    const int64_t s = r->s;
    const int32_t *counts = (const int32_t *)(uintptr_t)OPTION(counts, 0);
    const uint8_t *prompt = (const uint8_t *)(uintptr_t)OPTION(prompt_mask, 0);
    const float repetition = OPTION(repetition, 1.0f);
    const float f = OPTION(frequency, 0.0f), p = OPTION(presence, 0.0f);
    memcpy(y + r->lo, r->x + r->lo, (size_t)(r->hi - r->lo) * sizeof *y);
    if (repetition != 1.0f && (counts || prompt)) {
        for (int64_t i = r->lo; i < r->hi; i++) {
            int seen = (prompt && prompt[i]) || (counts && counts[i] > 0);
            y[i] = !seen ? y[i] : y[i] > 0.0f ? y[i] / repetition : y[i] * repetition;
        }
    }
    if ((f != 0.0f || p != 0.0f) && counts) {
        for (int64_t i = r->lo; i < r->hi; i++) y[i] -= f * (float)counts[i] + (counts[i] > 0 ? p : 0.0f);
    }
    if (!a->banned_start) return;
    for (int32_t i = a->banned_start[s]; i < a->banned_start[s + 1]; i++)
        if (a->banned[i] >= r->lo && a->banned[i] < r->hi) y[a->banned[i]] = -INFINITY;
}

static int has_changes(const ae_sample *a, int64_t s) {
    return OPTION(counts, 0) || OPTION(prompt_mask, 0) ||
           (a->banned_start && a->banned_start[s] < a->banned_start[s + 1]);
}

/* The row's token, or -1, at the leader. */
static int32_t draw_row(row *r) {
    const ae_sample *a = r->a;
    const int64_t s = r->s;
    if (a->head_k && a->head_k[s] > 0) return is_leader(r) ? draw_best(a, s, &a->best[s]) : -1;
    if (has_changes(a, s)) {
        if (isnan(survey_row(r, r->x))) return -1;
        float *changed = copy_at(desk_of(r, 0));
        penalize(r, changed);
        r->x = changed;
        meet(r);
    }
    const float temperature = OPTION(temperature, 0.0f);
    if (temperature < AE_GREEDY) return draw_few(r, 1);
    r->temperature = temperature;
    int64_t k = OPTION(top_k, 0);
    if (k < 1 || k >= a->vocab) k = 0;
    if (k && k <= AE_BEST) return draw_few(r, (int)k);
    const float max = survey_row(r, r->x) / temperature;
    if (!(max < INFINITY)) return -1;
    if (k || OPTION(top_p, 1.0f) < 1.0f || OPTION(min_p, 0.0f) > 0.0f) return draw_filtered(r, k, max);
    return draw_all(r, max);
}

static int by_rank(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* The n largest of the gathered elements with their logprobs, into the row's top ids. */
static void list_top(const row *r, int64_t n, double log_total) {
    const ae_sample *a = r->a;
    desk *d = desk_of(r, 0);
    int32_t *ids = a->top_ids + r->s * a->max_logprobs;
    float *logprobs = a->top_logprobs + r->s * a->max_logprobs;
    uint64_t *words = (uint64_t *)copy_at(d); /* this and the weights after it have room for them */
    join(r);
    for (int64_t i = 0; i < d->found; i++) words[i] = word_of(x_at(r, d)[i], ids_at(r, d)[i]);
    qsort(words, (size_t)d->found, sizeof *words, by_rank);
    for (int64_t i = 0; i < n; i++) {
        const int exists = i < d->found;
        ids[i] = exists ? word_id(words[i]) : -1;
        logprobs[i] = exists ? (float)((double)word_value(words[i]) - log_total) : -INFINITY;
    }
}

/* Logprobs of the row, whose token the leader knows. */
static void report(const row *r) {
    const ae_sample *a = r->a;
    const int64_t s = r->s, n = OPTION(num_logprobs, -1);
    if (n < 0) return;
    meet(r);
    const int32_t token = desk_of(r, 0)->token;
    const float *x = a->logits + s * a->vocab;
    if (token < 0) {
        if (!is_leader(r)) return;
        a->logprob[s] = NAN;
        a->rank[s] = 0;
        for (int64_t i = 0; i < n; i++) a->top_ids[s * a->max_logprobs + i] = -1;
        for (int64_t i = 0; i < n; i++) a->top_logprobs[s * a->max_logprobs + i] = NAN;
        return;
    }
    const float max = survey_row(r, x), value = x[token];
    weigh_strips(r, x, 1.0f, max);
    gather(r, x, n > 0 ? bound_of_count(r, n) : INFINITY);
    int32_t rank = 0;
    for (int64_t i = r->lo; i < r->hi; i++) rank += x[i] > value || (x[i] == value && i < token);
    own_desk(r)->rank = rank;
    meet(r);
    if (!is_leader(r)) return;
    const double log_total = (double)max + log(total_mass(r));
    a->logprob[s] = (float)((double)value - log_total);
    a->rank[s] = 1;
    for (int t = 0; t < r->size; t++) a->rank[s] += desk_of(r, t)->rank;
    list_top(r, n, log_total);
}

static void sample_row(row r) {
    const int32_t token = draw_row(&r);
    if (is_leader(&r)) r.a->tokens[r.s] = desk_of(&r, 0)->token = token;
    report(&r);
    meet(&r);
}

static void k_sample(const ae_sample *a, const ae_thread *thread) {
    const int64_t alone = a->rows - a->rows % thread->nthreads;
    row r = {.a = a, .thread = thread, .first = thread->tid, .size = 1, .hi = a->vocab, .temperature = 1.0f};
    while ((r.s = ae_next(thread, alone, 1)) >= 0) {
        r.x = a->logits + r.s * a->vocab;
        sample_row(r);
    }
    if (alone == a->rows) return;
    if (alone) ae_barrier(thread);
    r.first = 0;
    r.size = thread->nthreads;
    ae_share(thread, a->vocab, AE_STRIP, &r.lo, &r.hi);
    for (r.s = alone; r.s < a->rows; r.s++) {
        r.x = a->logits + r.s * a->vocab;
        sample_row(r);
    }
}

#undef OPTION
#undef BLOCK
#undef PEAK_RUN
#undef LIKELY
