/* Rotation of float32 rows (rotate.h), factor by factor. The order of a row's sums depends only on
 * its width. */
#pragma once
#include "rotate.h"
#include "simd.h"

/* Hadamard's transform of a[0 .. f), f a power of two. */
AE_INLINE void hadamard_of(vf *a, const int f) {
    for (int step = 1; step < f; step *= 2)
        EACH(i, f)
            if ((i & step) == 0) {
                const vf b = a[i], c = a[i + step];
                a[i] = vf_add(b, c);
                a[i + step] = vf_sub(b, c);
            }
}

/* The cosines and sines of (i + 1)(j + 1) / f of a turn, i, j < f / 2, at j * (f / 2) + i. */
typedef struct turns {
    float cosine[AE_MOST_FACTOR / 2 * (AE_MOST_FACTOR / 2)], sine[AE_MOST_FACTOR / 2 * (AE_MOST_FACTOR / 2)];
} turns;

AE_INLINE void find_turns(turns *t, const int f) {
    const int half = f / 2;
    for (int j = 0; j < half; j++)
        for (int i = 0, at = j + 1; i < half; i++, at = at + j + 1 < f ? at + j + 1 : at + j + 1 - f) {
            t->cosine[j * half + i] = ae_cos[f][at];
            t->sine[j * half + i] = ae_sin[f][at];
        }
}

/* Hartley's transform of a[0 .. f), f odd: a_i and a_(f-i) meet the same cosines, and sines of other signs; so do
 * the results j and f - j. */
AE_INLINE void hartley_of(vf *a, const int f, const turns *t) {
    const int half = f / 2;
    vf sum[AE_MOST_FACTOR / 2], difference[AE_MOST_FACTOR / 2], first = a[0], all = a[0];
    EACH(i, half) {
        sum[i] = vf_add(a[1 + i], a[f - 1 - i]);
        difference[i] = vf_sub(a[1 + i], a[f - 1 - i]);
        all = vf_add(all, sum[i]);
    }
    a[0] = all;
    EACH(j, half) {
        vf even = first, odd = vf_zero();
        EACH(i, half) {
            even = vf_fma(vf_set(t->cosine[j * half + i]), sum[i], even);
            odd = vf_fma(vf_set(t->sine[j * half + i]), difference[i], odd);
        }
        a[1 + j] = vf_add(even, odd);
        a[f - 1 - j] = vf_sub(even, odd);
    }
}

AE_INLINE void factor_of(vf *a, const int f, const turns *t) {
    if (f == 9) {
        EACH(i, 3) hartley_of(a + 3 * i, 3, t);
        EACH(i, 3) {
            vf b[3] = {a[i], a[i + 3], a[i + 6]};
            hartley_of(b, 3, t);
            EACH(j, 3) a[i + 3 * j] = b[j];
        }
    } else if (f % 2) {
        hartley_of(a, f, t);
    } else {
        hadamard_of(a, f);
    }
}

/* The transform of a factor f of k: over values that lie `stride` apart, `stride` times for every f * stride. */
AE_INLINE void rotate_by(float *x, int64_t k, int64_t stride, const int f) {
    vf a[AE_MOST_FACTOR];
    turns t;
    if (f % 2) find_turns(&t, f == 9 ? 3 : f);
    for (float *run = x; run < x + k; run += f * stride) {
        int64_t c = 0;
        for (; c + W <= stride; c += W) {
            EACH(i, f) a[i] = vf_load(run + i * stride + c);
            factor_of(a, f, &t);
            EACH(i, f) vf_store(run + i * stride + c, a[i]);
        }
        if (c < stride) {
            const int n = (int)(stride - c);
            EACH(i, f) a[i] = vf_load_n(run + i * stride + c, n);
            factor_of(a, f, &t);
            EACH(i, f) vf_store_n(run + i * stride + c, a[i], n);
        }
    }
}

static void rotate_by_2(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 2); }
static void rotate_by_4(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 4); }
static void rotate_by_8(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 8); }
static void rotate_by_3(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 3); }
static void rotate_by_5(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 5); }
static void rotate_by_7(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 7); }
static void rotate_by_9(float *x, int64_t k, int64_t stride) { rotate_by(x, k, stride, 9); }

static void rotate_by_any(float *x, int64_t k, int64_t stride, int f) { rotate_by(x, k, stride, f); }

/* The factors up to 4 W, a multiple of which k is. */
static void rotate_near(float *out, const float *x, int64_t k) {
    vf a[4];
    for (int64_t i = 0; i < k; i += 4 * W) {
        EACH(j, 4) a[j] = vf_hadamard(vf_load(x + i + j * W));
        hadamard_of(a, 4);
        EACH(j, 4) vf_store(out + i + j * W, a[j]);
    }
}

/* k values of x into `out`, which may be x. */
static void rotate_row(float *out, const float *x, int64_t k) {
    const int64_t power = k & -k;
    int64_t done = 1;
    if (power >= 4 * W) {
        rotate_near(out, x, k);
        if (k == 4 * W) return;
        done = 4 * W;
    } else if (out != x) {
        memcpy(out, x, (size_t)k * sizeof *x);
    }
    for (; 8 * done <= power; done *= 8) rotate_by_8(out, k, done);
    if (4 * done <= power) rotate_by_4(out, k, done), done *= 4;
    if (2 * done <= power) rotate_by_2(out, k, done), done *= 2;
    int64_t odd = k / power; /* what is left of k */
    for (; odd % 9 == 0; odd /= 9, done *= 9) rotate_by_9(out, k, done);
    for (; odd % 3 == 0; odd /= 3, done *= 3) rotate_by_3(out, k, done);
    for (; odd % 5 == 0; odd /= 5, done *= 5) rotate_by_5(out, k, done);
    for (; odd % 7 == 0; odd /= 7, done *= 7) rotate_by_7(out, k, done);
    for (int f = 11; f <= AE_MOST_FACTOR && f <= odd; f += 2)
        for (; odd % f == 0; odd /= f, done *= f) rotate_by_any(out, k, done, f);
}
