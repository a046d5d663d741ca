/* Rotation of float32 rows (rotate.h), in place, factor by factor. The order of a row's sums depends only on
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

/* Hartley's transform of a[0 .. f), f odd. */
AE_INLINE void hartley_of(vf *a, const int f) {
    vf out[AE_MOST_FACTOR];
    const float *first = ae_hartley[f];
    EACH(j, f) {
        out[j] = a[0];
        for (int i = 1, at = j; i < f; i++, at = at + j < f ? at + j : at + j - f)
            out[j] = j ? vf_fma(vf_set(first[at]), a[i], out[j]) : vf_add(out[j], a[i]);
    }
    for (int j = 0; j < f; j++) a[j] = out[j];
}

AE_INLINE void factor_of(vf *a, const int f) {
    if (f == 9) {
        EACH(i, 3) hartley_of(a + 3 * i, 3);
        EACH(i, 3) {
            vf b[3] = {a[i], a[i + 3], a[i + 6]};
            hartley_of(b, 3);
            EACH(j, 3) a[i + 3 * j] = b[j];
        }
    } else if (f % 2) {
        hartley_of(a, f);
    } else {
        hadamard_of(a, f);
    }
}

/* The transform of a factor f of k: over values that lie `stride` apart, `stride` times for every f * stride. */
AE_INLINE void rotate_by(float *x, int64_t k, int64_t stride, const int f) {
    vf a[AE_MOST_FACTOR];
    for (float *run = x; run < x + k; run += f * stride) {
        int64_t c = 0;
        for (; c + W <= stride; c += W) {
            EACH(i, f) a[i] = vf_load(run + i * stride + c);
            factor_of(a, f);
            EACH(i, f) vf_store(run + i * stride + c, a[i]);
        }
        if (c < stride) {
            const int n = (int)(stride - c);
            EACH(i, f) a[i] = vf_load_n(run + i * stride + c, n);
            factor_of(a, f);
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
static void rotate_near(float *x, int64_t k) {
    vf a[4];
    for (int64_t i = 0; i < k; i += 4 * W) {
        EACH(j, 4) a[j] = vf_hadamard(vf_load(x + i + j * W));
        hadamard_of(a, 4);
        EACH(j, 4) vf_store(x + i + j * W, a[j]);
    }
}

static void rotate_row(float *x, int64_t k) {
    const int64_t power = k & -k;
    int64_t done = 1;
    if (power >= 4 * W) {
        rotate_near(x, k);
        done = 4 * W;
    }
    for (; 8 * done <= power; done *= 8) rotate_by_8(x, k, done);
    if (4 * done <= power) rotate_by_4(x, k, done), done *= 4;
    if (2 * done <= power) rotate_by_2(x, k, done), done *= 2;
    int64_t odd = k / power; /* what is left of k */
    for (; odd % 9 == 0; odd /= 9, done *= 9) rotate_by_9(x, k, done);
    for (; odd % 3 == 0; odd /= 3, done *= 3) rotate_by_3(x, k, done);
    for (; odd % 5 == 0; odd /= 5, done *= 5) rotate_by_5(x, k, done);
    for (; odd % 7 == 0; odd /= 7, done *= 7) rotate_by_7(x, k, done);
    for (int f = 11; f <= AE_MOST_FACTOR && f <= odd; f += 2)
        for (; odd % f == 0; odd /= f, done *= f) rotate_by_any(x, k, done, f);
}
