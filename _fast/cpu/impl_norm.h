/* RMS norms. A row belongs to one thread and is summed in an order that depends only on its width. */
#pragma once
#include "cpu.h"
#include "impl_quantize.h"
#include "simd.h"

/* out = x / sqrt(mean(x^2) + eps) * weight over n elements, as floats (out may be x, or NULL) and as a
 * quantized row of `group` (row8 may be NULL). `spare` is memory for n floats, if that is whole. */
AE_INLINE void norm_row(float *out, int8_t *row8, int64_t group, const float *x, const float *weight,
                        int64_t n, float eps, float *spare) {
    enum { CHUNK = 512 };
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
    const int whole = row8 && ae_is_whole(group);
    float staged[CHUNK];
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const int64_t end = begin + CHUNK < n ? begin + CHUNK : n;
        float *to = out ? out + begin : whole ? spare + begin : staged;
        for (i = begin; i + W <= end; i += W)
            vf_store(to + i - begin, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(weight + i)));
        if (i < end) {
            int rest = (int)(end - i);
            vf scaled = vf_mul(vf_load_n(x + i, rest), scale);
            vf_store_n(to + i - begin, vf_mul(scaled, vf_load_n(weight + i, rest)), rest);
        }
        if (row8 && !whole) quantize_groups(row8, to, n, group, begin, end);
    }
    if (whole) quantize_whole(row8, spare, out ? out : spare, n, group);
}

AE_INLINE void rms_norm(float *out, const float *x, const float *weight, int64_t n, float eps) {
    norm_row(out, NULL, 0, x, weight, n, eps, NULL);
}

/* Row m of an op's output as floats (p0) and as a quantized row (p4, n3), NULL where the op has none. */
AE_INLINE float *out_row(const ae_op *op, int64_t m, int64_t width) {
    return op->p[0] ? (float *)op->p[0] + m * width : NULL;
}

AE_INLINE int8_t *out_row8(const ae_op *op, int64_t m, int64_t width) {
    return op->p[4] ? (int8_t *)op->p[4] + m * ae_row8_bytes(width, op->n[3]) : NULL;
}

static void k_rms_norm(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t H = op->n[0];
    int64_t lo, hi;
    ae_share(thread, ae_rows_of(op, step), 1, &lo, &hi);
    for (int64_t m = lo; m < hi; m++) {
        const float *x = (const float *)op->p[1] + m * H;
        if (m + 1 < hi) ae_prefetch(x + H, H);
        norm_row(out_row(op, m, H), out_row8(op, m, H), op->n[3], x, op->p[2], H, op->f[0], thread->scratch);
    }
}
