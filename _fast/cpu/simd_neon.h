/* What NEON has instructions for that the compiler does not find by itself: part of simd.h. */
#pragma once
#include <arm_neon.h>

AE_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
/* In assembly: given the intrinsic, gcc makes a vector of copies all the same, an instruction more. */
typedef float vs;
AE_INLINE vs vs_load(const float *p) { return *p; }
AE_INLINE vf vs_fma(vs a, vf b, vf c) {
    __asm__("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(b), "w"(a));
    return c;
}
AE_INLINE vf vf_round(vf a) { return vrndnq_f32(a); }
AE_INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
AE_INLINE float vf_hmax(vf a) { return vmaxvq_f32(a); }
AE_INLINE unsigned vf_not_below(vf a, vf b) { return vaddvq_u32((uint32x4_t)(~(a < b) & (vi){1, 2, 4, 8})); }
AE_INLINE vf vf_from_bf16(vh h) { return (vf)vshll_n_u16((uint16x4_t)h, 16); }
AE_INLINE vf vf_from_f16(vh h) { return vcvt_f32_f16((float16x4_t)h); }
AE_INLINE vh vf_to_f16(vf x) { return (vh)vcvt_f16_f32(x); }
AE_INLINE vf vf_from_i8(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(word));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
/* See the other levels. */
AE_INLINE vf vf_hadamard(vf a) {
    a = vfmaq_f32(vextq_f32(a, a, 2), a, (vf){1, 1, -1, -1});
    return vfmaq_f32(vrev64q_f32(a), a, (vf){1, -1, 1, -1});
}

#if defined(AE_LEVEL_NEONBF16)
#define BF16_DOT
typedef float bf16_pair;
AE_INLINE bf16_pair bf16_pair_of(int32_t bits) { return ae_bits_f32((uint32_t)bits); }
AE_INLINE vf bf16_dot(vf sum, bf16_pair a, vi b) {
    __asm__("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(sum) : "w"(b), "w"(a));
    return sum;
}
/* See avx512bf16. */
AE_INLINE void bf16_put(uint16_t *p, vf x) {
    vh rounded;
    __asm__("bfcvtn %0.4h, %1.4s" : "=w"(rounded) : "w"(x));
    memcpy(p, &rounded, sizeof rounded);
}
AE_INLINE vi vi_pairs(const char *low, const char *high) {
    uint16x4_t a, b;
    memcpy(&a, low, sizeof a);
    memcpy(&b, high, sizeof b);
    const uint16x4x2_t words = vzip_u16(a, b);
    return (vi)vcombine_u16(words.val[0], words.val[1]);
}
#endif
