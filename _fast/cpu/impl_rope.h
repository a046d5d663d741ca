/* Per-head norm, rotary embedding and the write into the paged cache, one head of one token at a time. Queries and
 * keys of an int8 cache are rotated too (attention.h). */
#pragma once
#include "attention.h"
#include "impl_norm.h"
#include "impl_quantize.h"
#include "typed.h"

/* (x1, x2) -> (x1 c - x2 s, x2 c + x1 s) for the two halves of x, `half` elements each. */
AE_INLINE void embed_part(float *x, const float *cos_sin, int64_t half, int64_t i, int64_t n) {
    vf a = load_as(AE_F32, x, i, n), b = load_as(AE_F32, x, half + i, n);
    vf c = load_as(AE_F32, cos_sin, i, n), s = load_as(AE_F32, cos_sin, half + i, n);
    store_as(AE_F32, x, i, vf_sub(vf_mul(a, c), vf_mul(b, s)), n);
    store_as(AE_F32, x, half + i, vf_fma(b, c, vf_mul(a, s)), n);
}

static void embed_position(float *x, const float *cos_sin, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) embed_part(x, cos_sin, half, i, W);
    if (i < half) embed_part(x, cos_sin, half, i, half - i);
}

/* x less the mean of what a bias becomes by embedding, of which `mean` has the mean cosines and sines. */
static void leave_out(float *x, const float *bias, const float *mean, int64_t half, int64_t n) {
    float common[MAX_DIM];
    memcpy(common, bias, (size_t)n * sizeof *x);
    embed_position(common, mean, half);
    for (int64_t i = 0; i < n; i += W)
        store_as(AE_F32, x, i, vf_sub(load_as(AE_F32, x, i, n - i), load_as(AE_F32, common, i, n - i)), n - i);
}

AE_INLINE void narrow_row(int type, void *cache, int64_t first, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store_as(type, cache, first + i, load_as(AE_F32, x, i, n - i), n - i);
}

/* n <= MAX_DIM values as codes with one scale (attention.h). */
static void quantize_values(int8_t *codes, float *scale, const float *x, int64_t n) {
    int8_t staged[MAX_DIM]; /* whole vectors, behind which others' codes would lie */
    int32_t sum;
    quantize_group(staged, scale, &sum, x, n, ae_group_width(n, AE_WHOLE));
    memcpy(codes, staged, (size_t)n);
}

/* Row number `row` of the Hk * block rows of a cache block, D elements each. */
static void write_row(int type, char *block, int64_t rows, int64_t row, const float *x, int64_t D) {
    if (type == AE_F32) narrow_row(AE_F32, block, row * D, x, D);
    else if (type == AE_BF16) narrow_row(AE_BF16, block, row * D, x, D);
    else if (type == AE_F16) narrow_row(AE_F16, block, row * D, x, D);
    else {
        float *scales = (float *)(block + ae_kv_scales_at(1, rows, D));
        quantize_values((int8_t *)block + row * D, scales + row, x, D);
    }
}

static void k_rope_kv(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t Hq = op->n[0], Hk = op->n[1], D = op->n[2], rotary = op->n[3], block = op->n[4];
    const int64_t heads = Hq + 2 * Hk, type = op->n[5];
    const float *bias = op->p[5] ? NULL : op->p[6];
    int64_t lo, hi;
    ae_share(thread, step->num_tokens * heads, 1, &lo, &hi);
    for (int64_t unit = lo, t = lo / heads, stop; unit < hi; unit = stop, t++) {
        stop = (t + 1) * heads < hi ? (t + 1) * heads : hi;
        const int64_t position = step->positions[t], slot = step->row_slot[step->token_row[t]];
        const float *cos_sin = (const float *)op->p[1] + position * rotary;
        const int64_t at = step->block_table[slot * step->table_stride + position / block] * op->n[8];
        const int64_t in_block = position % block;
        for (; unit < stop; unit++) {
            const int64_t h = unit - t * heads;
            float *x = (float *)op->p[0] + unit * D;
            if (unit + heads < hi) ae_prefetch(x + heads * D, D);
            if (h < Hq + Hk) {
                const float *weight = op->p[h < Hq ? 4 : 5];
                if (weight) rms_norm(x, x, weight, D, op->f[0]);
                embed_position(x, cos_sin, rotary / 2);
                if (type == AE_I8) {
                    if (h >= Hq && bias) leave_out(x, bias + h * D, op->p[7], rotary / 2, D);
                    rotate_row(x, x, D);
                }
            }
            if (h < Hq) continue;
            const int64_t head = h < Hq + Hk ? h - Hq : h - Hq - Hk;
            char *cache = (char *)op->p[h < Hq + Hk ? 2 : 3] + at;
            write_row((int)type, cache, Hk * block, head * block + in_block, x, D);
        }
    }
}
