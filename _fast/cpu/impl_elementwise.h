/* Embedding, the choice of the sampled rows, and the SiLU * up that ends gated linears. */
#pragma once
#include "cpu.h"
#include "impl_norm.h"
#include "impl_unpack.h"
#include "typed.h"

AE_INLINE void widen_row(int type, float *out, const void *table, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i += W)
        store_as(AE_F32, out, i, load_as(type, table, first + i, n - i), n - i);
}

static void k_embed(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t H = op->n[0], first = op->n[2], count = op->n[3];
    int64_t lo, hi;
    ae_share(thread, ae_rows_of(op, step), 1, &lo, &hi);
    for (int64_t m = lo; m < hi; m++) {
        float *out = (float *)op->p[0] + m * H;
        const int64_t row = step->token_ids[m] - first;
        if (row < 0 || row >= count) memset(out, 0, (size_t)H * sizeof *out);
        else if (op->n[4]) unpack_row(out, op->p[1], row, H, (int)op->n[1], op->n[5], (int)op->n[6]);
        else if (op->n[1] == AE_F32) widen_row(AE_F32, out, op->p[1], row * H, H);
        else if (op->n[1] == AE_BF16) widen_row(AE_BF16, out, op->p[1], row * H, H);
        else widen_row(AE_F16, out, op->p[1], row * H, H);
    }
}

AE_INLINE vf silu_mul(vf gate, vf up) {
    const vf x = vf_add(vf_set(1.0f), vf_exp(vf_sub(vf_zero(), gate)));
    return vf_mul(vf_mul(gate, vf_reciprocal(x)), up);
}

static void k_select(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t H = op->n[0];
    int64_t lo, hi;
    ae_share(thread, step->num_samples, 1, &lo, &hi);
    for (int64_t s = lo; s < hi; s++) {
        const float *x = (const float *)op->p[1] + step->sample_rows[s] * H;
        if (op->p[0]) memcpy(out_row(op, s, H), x, (size_t)H * sizeof *x);
        if (op->p[4]) quantize_row(out_row8(op, s, H), x, H, op->n[3], thread->scratch);
    }
}
