/* Per-head norm, rotary embedding and the write into the paged cache, one head of one token at a time. */
#pragma once
#include "cpu.h"
#include "impl_norm.h"
#include "typed.h"

/* (x1, x2) -> (x1 c - x2 s, x2 c + x1 s) for the two halves of x, `half` elements each. */
AE_INLINE void rotate_part(float *x, const float *cos_sin, int64_t half, int64_t i, int64_t n) {
    vf a = load_as(AE_F32, x, i, n), b = load_as(AE_F32, x, half + i, n);
    vf c = load_as(AE_F32, cos_sin, i, n), s = load_as(AE_F32, cos_sin, half + i, n);
    store_as(AE_F32, x, i, vf_sub(vf_mul(a, c), vf_mul(b, s)), n);
    store_as(AE_F32, x, half + i, vf_fma(b, c, vf_mul(a, s)), n);
}

static void rotate(float *x, const float *cos_sin, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) rotate_part(x, cos_sin, half, i, W);
    if (i < half) rotate_part(x, cos_sin, half, i, half - i);
}

AE_INLINE void narrow_row(int type, void *cache, int64_t first, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store_as(type, cache, first + i, load_as(AE_F32, x, i, n - i), n - i);
}

static void write_row(int type, void *cache, int64_t first, const float *x, int64_t n) {
    if (type == AE_F32) narrow_row(AE_F32, cache, first, x, n);
    else if (type == AE_BF16) narrow_row(AE_BF16, cache, first, x, n);
    else narrow_row(AE_F16, cache, first, x, n);
}

static void k_rope_kv(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t Hq = op->n[0], Hk = op->n[1], D = op->n[2], rotary = op->n[3], block = op->n[4];
    const int64_t heads = Hq + 2 * Hk;
    int64_t lo, hi;
    ae_share(thread, step->num_tokens * heads, 1, &lo, &hi);
    for (int64_t unit = lo; unit < hi; unit++) {
        const int64_t t = unit / heads, h = unit % heads, position = step->positions[t];
        float *x = (float *)op->p[0] + unit * D;
        if (h < Hq + Hk) {
            const float *weight = op->p[h < Hq ? 4 : 5];
            if (weight) rms_norm(x, x, weight, D, op->f[0]);
            rotate(x, (const float *)op->p[1] + position * rotary, rotary / 2);
        }
        if (h < Hq) continue;
        const int64_t slot = step->row_slot[step->token_row[t]];
        const int32_t *table = step->block_table + slot * step->table_stride;
        const int64_t head = h < Hq + Hk ? h - Hq : h - Hq - Hk;
        const int64_t row = (table[position / block] * Hk + head) * block + position % block;
        write_row((int)op->n[5], op->p[h < Hq + Hk ? 2 : 3], row * D, x, D);
    }
}
