/* The range of a group's values, and the scale and minimum of 4-bit codes for it. */
#pragma once
#include "simd.h"

/* Candidates for the range of 4-bit codes: the whole one, and smaller by this share of it each time. */
#define RANGES 10
#define SHRINK 0.035f
#define MOST_FITTED 128 /* values of a group */

typedef struct range {
    float low, high, peak; /* peak: the value of largest magnitude */
} range;

/* x is padded to whole vectors with its own last value; NaNs and infinities give an infinite range. */
static range range_of(const float *x, int64_t n) {
    vf low = vf_load(x), high = low, bad = vf_zero();
    for (int64_t i = 0; i < n; i += W) {
        vf v = vf_load(x + i);
        low = vf_min(low, v);
        high = vf_max(high, v);
        bad = vf_fma(v, vf_zero(), bad);
    }
    range r = {-vf_hmax(vf_sub(vf_zero(), low)), vf_hmax(high), 0};
    if (vf_sum(bad) != 0) r.low = -INFINITY, r.high = INFINITY;
    r.peak = -r.low > r.high ? r.low : r.high;
    return r;
}

/* Sums over a group's codes l in [first, first + 15] of x / scale: what least squares needs. */
typedef struct moments {
    float l, ll, xl;
} moments;

static moments moments_of(const float *x, int64_t n, float scale, float minimum, float first) {
    const vf inverse = vf_set(1 / scale), least = vf_set(first), most = vf_set(first + 15);
    const vf shift = vf_set(-minimum / scale);
    vf l = vf_zero(), ll = vf_zero(), xl = vf_zero();
    for (int64_t i = 0; i < n; i += W) {
        const vf v = vf_load(x + i);
        const vf q = vf_max(least, vf_min(most, vf_round(vf_fma(v, inverse, shift))));
        l = vf_add(l, q);
        ll = vf_fma(q, q, ll);
        xl = vf_fma(v, q, xl);
    }
    return (moments){vf_sum(l), vf_sum(ll), vf_sum(xl)};
}

typedef struct fit {
    float scale, minimum;
} fit;

/* Those of least squared error of n whole vectors of x, over several ranges from which outliers fall out, each
 * with its codes' least-squares fit. A group of one value has the scale 0. */
static fit fit_of(const float *x, int64_t n, range r) {
    const float width = (r.high - r.low) / 15, middle = (r.low + r.high) / 2, count = (float)n;
    vf sum = vf_zero();
    for (int64_t i = 0; i < n; i += W) sum = vf_add(sum, vf_sub(vf_load(x + i), vf_set(middle)));
    const float mean = vf_sum(sum) / count; /* from the middle, as x below: their squares would swallow it */
    float centred[MOST_FITTED], best = -1;
    fit f = {width, r.low};
    if (width == 0) return f;
    for (int64_t i = 0; i < n; i += W) vf_store(centred + i, vf_sub(vf_load(x + i), vf_set(middle)));
    for (int i = 0; i < RANGES; i++) {
        const float d = width * (1.02f - SHRINK * (float)i);
        const moments s = moments_of(centred, n, d, -7.5f * d, 0);
        const float spread = s.ll - s.l * s.l / count, together = s.xl - mean * s.l;
        if (!(spread > 0 && together * together / spread > best)) continue;
        best = together * together / spread;
        f.scale = together / spread;
        f.minimum = middle + mean - f.scale * s.l / count;
    }
    return f;
}
