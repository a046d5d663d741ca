/* Vectors of float32 from and to arrays whose element type is named by an `ae_dtype`; `type` should be a
 * constant where it matters, so that the branches fold. */
#pragma once
#include "cpu.h"
#include "simd.h"

static inline size_t ae_type_size(int type) { return type == AE_F32 ? 4 : type == AE_I8 ? 1 : 2; }

/* Elements [i, i + n) of p, n <= W; zeros beyond. */
AE_INLINE vf load_as(int type, const void *p, int64_t i, int64_t n) {
    if (type == AE_F32)
        return n >= W ? vf_load((const float *)p + i) : vf_load_n((const float *)p + i, (int)n);
    if (type == AE_I8)
        return n >= W ? vf_load_i8((const int8_t *)p + i) : vf_load_i8_n((const int8_t *)p + i, (int)n);
    const uint16_t *h = (const uint16_t *)p + i;
    if (type == AE_BF16) return n >= W ? vf_load_bf16(h) : vf_load_bf16_n(h, (int)n);
    return n >= W ? vf_load_f16(h) : vf_load_f16_n(h, (int)n);
}

/* Part k of every 32-bit word, as the array of `type` in memory has its elements. */
AE_INLINE vf part_as(int type, vf words, int k) {
    if (type == AE_F32) return words;
    if (type == AE_I8) return vi_byte(vf_bits(words), k);
    if (type == AE_BF16) return k ? vi_high_bf16(vf_bits(words)) : vi_low_bf16(vf_bits(words));
    return k ? vi_high_f16(vf_bits(words)) : vi_low_f16(vf_bits(words));
}

AE_INLINE void store_as(int type, void *p, int64_t i, vf x, int64_t n) {
    uint16_t *h = (uint16_t *)p + i;
    if (type == AE_F32 && n >= W) vf_store((float *)p + i, x);
    else if (type == AE_F32) vf_store_n((float *)p + i, x, (int)n);
    else if (type == AE_BF16 && n >= W) vf_store_bf16(h, x);
    else if (type == AE_BF16) vf_store_bf16_n(h, x, (int)n);
    else if (n >= W) vf_store_f16(h, x);
    else vf_store_f16_n(h, x, (int)n);
}
