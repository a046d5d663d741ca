/* RMS norms. A row belongs to one thread and is summed in an order that depends only on its width. */
#pragma once
#include "cpu.h"
#include "simd.h"

/* out = x / sqrt(mean(x^2) + eps) * weight over n elements; out may be x. */
AE_INLINE void rms_norm(float *out, const float *x, const float *weight, int64_t n, float eps) {
    vf sums[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int k = 0; k < 4; k++) {
            vf v = vf_load(x + i + k * W);
            sums[k] = vf_fma(v, v, sums[k]);
        }
    }
    for (; i < n; i += W) {
        vf v = i + W <= n ? vf_load(x + i) : vf_load_n(x + i, (int)(n - i));
        sums[0] = vf_fma(v, v, sums[0]);
    }
    float sum = vf_sum(vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])));
    const vf scale = vf_set(1.0f / sqrtf(sum / (float)n + eps));
    for (i = 0; i + W <= n; i += W)
        vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(weight + i)));
    if (i < n) {
        int rest = (int)(n - i);
        vf_store_n(out + i, vf_mul(vf_mul(vf_load_n(x + i, rest), scale), vf_load_n(weight + i, rest)), rest);
    }
}

static void k_rms_norm(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t H = op->n[0];
    int64_t lo, hi;
    ae_share(thread, ae_rows_of(op, step), 1, &lo, &hi);
    for (int64_t m = lo; m < hi; m++)
        rms_norm((float *)op->p[0] + m * H, (const float *)op->p[1] + m * H, op->p[2], H, op->f[0]);
}

static void k_add_rms_norm(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t H = op->n[0];
    int64_t lo, hi;
    ae_share(thread, ae_rows_of(op, step), 1, &lo, &hi);
    for (int64_t m = lo; m < hi; m++) {
        float *residual = (float *)op->p[1] + m * H;
        const float *x = (const float *)op->p[2] + m * H;
        for (int64_t i = 0; i < H; i++) residual[i] += x[i];
        rms_norm((float *)op->p[0] + m * H, residual, op->p[3], H, op->f[0]);
    }
}
