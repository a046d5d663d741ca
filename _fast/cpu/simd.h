/* A float32 vector `vf` of W lanes, for the level that the including file has chosen by defining one of
 * AE_LEVEL_AVX512, AE_LEVEL_AVX2, AE_LEVEL_NEON or none (portable).
 *
 * `vs` is one number that multiplies all lanes: a vector of copies, unless the instructions take it as it is.
 * Levels that define BF16_DOT have the processor's dot product of pairs of bf16, in every lane of 32 bits.
 *
 * vf_not_below(a, b) has bit i set where a[i] < b[i] does not hold, as for a NaN.
 *
 * The `_n` forms touch only the first n lanes, 0 <= n <= W, and load zeros into the others.
 * Conversions to 16 bits round to nearest even.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

#define AE_INLINE static inline __attribute__((always_inline, unused))
/* A loop that is unrolled, so that arrays of vectors become registers. */
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

#if defined(AE_LEVEL_AVX512)
#include <immintrin.h>

#define W 16
typedef __m512 vf;
typedef __m512i vi;

#define MASK16(n) ((__mmask16)((1u << (n)) - 1))

AE_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
AE_INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
AE_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
AE_INLINE vf vf_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(MASK16(n), p); }
AE_INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
AE_INLINE void vf_store_n(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, MASK16(n), x); }
AE_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
AE_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
AE_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
AE_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
AE_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
AE_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
/* 1 / x for x >= 1, within 2 ulp; where that is below 2^-125 it is that instead. NaN stays NaN. */
AE_INLINE vf vf_reciprocal(vf x) {
    x = vf_min(vf_set(0x1p125f), x); /* in this order */
    const vf guess = _mm512_rcp14_ps(x); /* one step of Newton's is cheaper than a division */
    return vf_fma(guess, _mm512_fnmadd_ps(x, guess, vf_set(1)), guess);
}
AE_INLINE vf vf_round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AE_INLINE vf vf_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
AE_INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
AE_INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
AE_INLINE unsigned vf_not_below(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

/* W 32-bit words as they lie in memory; their upper and lower halves read as bf16. */
AE_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
AE_INLINE vf vi_low_bf16(vi a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
AE_INLINE vf vi_high_bf16(vi a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xFFFF0000)));
}

AE_INLINE vf vf_from_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
AE_INLINE __m256i vf_to_bf16(vf x) {
    __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
    __m512i bias = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, bias), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
AE_INLINE __m256i vf_to_f16(vf x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AE_INLINE vf vf_load_bf16(const uint16_t *p) { return vf_from_bf16(_mm256_loadu_si256((const __m256i *)p)); }
AE_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) {
    return vf_from_bf16(_mm256_maskz_loadu_epi16(MASK16(n), p));
}
AE_INLINE void vf_store_bf16(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, vf_to_bf16(x)); }
AE_INLINE void vf_store_bf16_n(uint16_t *p, vf x, int n) {
    _mm256_mask_storeu_epi16(p, MASK16(n), vf_to_bf16(x));
}
AE_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
AE_INLINE vf vf_load_f16_n(const uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(MASK16(n), p));
}
AE_INLINE void vf_store_f16(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, vf_to_f16(x)); }
AE_INLINE void vf_store_f16_n(uint16_t *p, vf x, int n) {
    _mm256_mask_storeu_epi16(p, MASK16(n), vf_to_f16(x));
}

/* The bits of the lanes; signed byte k, or either half, of every word as a number. */
AE_INLINE vi vf_bits(vf x) { return _mm512_castps_si512(x); }
AE_INLINE vf vi_low_f16(vi a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
AE_INLINE vf vi_high_f16(vi a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))); }
AE_INLINE vf vi_byte(vi a, int k) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, (unsigned)(24 - 8 * k)), 24));
}
AE_INLINE vf vf_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
AE_INLINE vf vf_load_i8_n(const int8_t *p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(MASK16(n), p)));
}

/* a H, with Hadamard's matrix of W rows: lanes that differ in one bit become their sum and difference. */
AE_INLINE vf vf_hadamard(vf a) {
    const vf one = vf_set(1), minus = vf_set(-1);
    a = _mm512_fmadd_ps(a, _mm512_mask_mov_ps(one, 0xFF00, minus), _mm512_shuffle_f32x4(a, a, 0x4E));
    a = _mm512_fmadd_ps(a, _mm512_mask_mov_ps(one, 0xF0F0, minus), _mm512_shuffle_f32x4(a, a, 0xB1));
    a = _mm512_fmadd_ps(a, _mm512_mask_mov_ps(one, 0xCCCC, minus), _mm512_permute_ps(a, 0x4E));
    return _mm512_fmadd_ps(a, _mm512_mask_mov_ps(one, 0xAAAA, minus), _mm512_permute_ps(a, 0xB1));
}

#elif defined(AE_LEVEL_AVX2)
#include <immintrin.h>

#define W 8
typedef __m256 vf;
typedef __m256i vi;

AE_INLINE __m256i vf_lanes(int n) {
    static const int32_t window[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256((const __m256i *)(window + 8 - n));
}

AE_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
AE_INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
AE_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
AE_INLINE vf vf_load_n(const float *p, int n) { return _mm256_maskload_ps(p, vf_lanes(n)); }
AE_INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
AE_INLINE void vf_store_n(float *p, vf x, int n) { _mm256_maskstore_ps(p, vf_lanes(n), x); }
AE_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
AE_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
AE_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
AE_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
AE_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
AE_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
AE_INLINE vf vf_reciprocal(vf x) { return _mm256_div_ps(vf_set(1), x); }
AE_INLINE vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* a * 2^n for integral |n| <= 250, in two factors so that subnormal results are reached exactly. */
AE_INLINE vf vf_scale2(vf a, vf n) {
    __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1), rest = _mm256_sub_epi32(e, half);
    __m256i one = _mm256_set1_epi32(127);
    a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23)));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23)));
}
AE_INLINE float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
AE_INLINE float vf_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
AE_INLINE unsigned vf_not_below(vf a, vf b) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ));
}

AE_INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
AE_INLINE vf vi_low_bf16(vi a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
AE_INLINE vf vi_high_bf16(vi a) {
    return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32((int)0xFFFF0000)));
}

AE_INLINE vf vf_from_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
AE_INLINE __m128i vf_to_bf16(vf x) {
    __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
    __m256i bias = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7FFF));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, bias), 16);
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
AE_INLINE __m128i vf_to_f16(vf x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AE_INLINE __m128i vf_load_u16_n(const uint16_t *p, int n) {
    uint16_t lanes[8] = {0};
    memcpy(lanes, p, (size_t)n * 2);
    return _mm_loadu_si128((const __m128i *)lanes);
}
AE_INLINE void vf_store_u16_n(uint16_t *p, __m128i h, int n) {
    uint16_t lanes[8];
    _mm_storeu_si128((__m128i *)lanes, h);
    memcpy(p, lanes, (size_t)n * 2);
}
AE_INLINE vf vf_load_bf16(const uint16_t *p) { return vf_from_bf16(_mm_loadu_si128((const __m128i *)p)); }
AE_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) { return vf_from_bf16(vf_load_u16_n(p, n)); }
AE_INLINE void vf_store_bf16(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, vf_to_bf16(x)); }
AE_INLINE void vf_store_bf16_n(uint16_t *p, vf x, int n) { vf_store_u16_n(p, vf_to_bf16(x), n); }
AE_INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
AE_INLINE vf vf_load_f16_n(const uint16_t *p, int n) { return _mm256_cvtph_ps(vf_load_u16_n(p, n)); }
AE_INLINE void vf_store_f16(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, vf_to_f16(x)); }
AE_INLINE void vf_store_f16_n(uint16_t *p, vf x, int n) { vf_store_u16_n(p, vf_to_f16(x), n); }

AE_INLINE vi vf_bits(vf x) { return _mm256_castps_si256(x); }
AE_INLINE vf vi_low_f16(vi a) {
    a = _mm256_and_si256(a, _mm256_set1_epi32(0xFFFF));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}
AE_INLINE vf vi_high_f16(vi a) { return vi_low_f16(_mm256_srli_epi32(a, 16)); }
AE_INLINE vf vi_byte(vi a, int k) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * k), 24));
}
AE_INLINE vf vf_load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
AE_INLINE vf vf_load_i8_n(const int8_t *p, int n) {
    int8_t lanes[8] = {0};
    memcpy(lanes, p, (size_t)n);
    return vf_load_i8(lanes);
}

/* a H, with Hadamard's matrix of W rows: lanes that differ in one bit become their sum and difference. */
AE_INLINE vf vf_hadamard(vf a) {
    const vf ends = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), pairs = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    a = _mm256_fmadd_ps(a, ends, _mm256_permute2f128_ps(a, a, 1));
    a = _mm256_fmadd_ps(a, pairs, _mm256_permute_ps(a, 0x4E));
    return _mm256_fmadd_ps(a, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(a, 0xB1));
}

#else /* four lanes: the compiler's vector extension, the width every 64-bit machine has */

#define W 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));

AE_INLINE vf vf_zero(void) { return (vf){0}; }
AE_INLINE vf vf_set(float x) { return (vf){x, x, x, x}; }
AE_INLINE vf vf_load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
AE_INLINE void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
/* Most parts are whole; copying another one is a call. */
AE_INLINE vf vf_load_n(const float *p, int n) {
    vf x = {0};
    if (n == W) return vf_load(p);
    memcpy(&x, p, (size_t)n * 4);
    return x;
}
AE_INLINE void vf_store_n(float *p, vf x, int n) {
    if (n == W) vf_store(p, x);
    else memcpy(p, &x, (size_t)n * 4);
}
AE_INLINE vf vf_add(vf a, vf b) { return a + b; }
AE_INLINE vf vf_sub(vf a, vf b) { return a - b; }
AE_INLINE vf vf_mul(vf a, vf b) { return a * b; }
AE_INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
AE_INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
AE_INLINE vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
AE_INLINE vf vf_reciprocal(vf x) { return 1 / x; }
AE_INLINE vf vf_scale2(vf a, vf n) {
    vi e = __builtin_convertvector(n, vi), half = e >> 1, rest = e - half;
    return a * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
}

#if defined(AE_LEVEL_NEON)
#include "simd_neon.h"
#else
AE_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
AE_INLINE vf vf_from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
/* Right for |a| < 2^22: the sum has no room for a fraction. */
AE_INLINE vf vf_round(vf a) {
    const vf magic = vf_set(12582912.0f);
    return (a + magic) - magic;
}
AE_INLINE float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
AE_INLINE float vf_hmax(vf a) {
    float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}
AE_INLINE unsigned vf_not_below(vf a, vf b) {
    vi bits = ~(a < b) & (vi){1, 2, 4, 8};
    return (unsigned)(bits[0] | bits[1] | bits[2] | bits[3]);
}
AE_INLINE vf vf_from_f16(vh h) {
    vu bits = __builtin_convertvector(h, vu);
    vu magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
    vf finite = (vf)magnitude * vf_set(0x1p112f);
    vf x = vf_select((vi)magnitude >= 0x0F800000, (vf)(magnitude | 0x7F800000u), finite);
    return (vf)((vu)x | sign);
}
AE_INLINE vh vf_to_f16(vf x) {
    return (vh){ae_f32_to_f16(x[0]), ae_f32_to_f16(x[1]), ae_f32_to_f16(x[2]), ae_f32_to_f16(x[3])};
}
AE_INLINE vf vf_from_i8(const int8_t *x) { return (vf){x[0], x[1], x[2], x[3]}; }
/* a H, with Hadamard's matrix of W rows: lanes that differ in one bit become their sum and difference. */
AE_INLINE vf vf_hadamard(vf a) {
    const vf b = {a[0] + a[2], a[1] + a[3], a[0] - a[2], a[1] - a[3]};
    return (vf){b[0] + b[1], b[0] - b[1], b[2] + b[3], b[2] - b[3]};
}
#endif

AE_INLINE vi vi_load(const void *p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}
AE_INLINE vf vi_low_bf16(vi a) { return (vf)((vu)a << 16); }
AE_INLINE vf vi_high_bf16(vi a) { return (vf)((vu)a & 0xFFFF0000u); }

AE_INLINE vh vh_load_n(const uint16_t *p, int n) {
    vh x = {0};
    memcpy(&x, p, (size_t)n * 2);
    return x;
}
AE_INLINE vh vf_to_bf16(vf x) {
    vu u = (vu)x, high = u >> 16, rounded = (u + 0x7FFFu + (high & 1u)) >> 16;
    return __builtin_convertvector((vu)vf_select(x != x, (vf)(high | 0x40u), (vf)rounded), vh);
}
AE_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) { return vf_from_bf16(vh_load_n(p, n)); }
AE_INLINE vf vf_load_bf16(const uint16_t *p) { return vf_load_bf16_n(p, W); }
AE_INLINE vf vf_load_f16_n(const uint16_t *p, int n) { return vf_from_f16(vh_load_n(p, n)); }
AE_INLINE vf vf_load_f16(const uint16_t *p) { return vf_load_f16_n(p, W); }
AE_INLINE void vf_store_bf16_n(uint16_t *p, vf x, int n) {
    vh h = vf_to_bf16(x);
    memcpy(p, &h, (size_t)n * 2);
}
AE_INLINE void vf_store_bf16(uint16_t *p, vf x) { vf_store_bf16_n(p, x, W); }
AE_INLINE void vf_store_f16_n(uint16_t *p, vf x, int n) {
    vh h = vf_to_f16(x);
    memcpy(p, &h, (size_t)n * 2);
}
AE_INLINE void vf_store_f16(uint16_t *p, vf x) { vf_store_f16_n(p, x, W); }

AE_INLINE vi vf_bits(vf x) { return (vi)x; }
AE_INLINE vf vi_low_f16(vi a) { return vf_from_f16(__builtin_convertvector((vu)a & 0xFFFFu, vh)); }
AE_INLINE vf vi_high_f16(vi a) { return vf_from_f16(__builtin_convertvector((vu)a >> 16, vh)); }
AE_INLINE vf vi_byte(vi a, int k) {
    return __builtin_convertvector((vi)((vu)a << (24 - 8 * k)) >> 24, vf);
}
AE_INLINE vf vf_load_i8_n(const int8_t *p, int n) {
    int8_t lanes[W] = {0};
    memcpy(lanes, p, (size_t)n);
    return vf_from_i8(lanes);
}
AE_INLINE vf vf_load_i8(const int8_t *p) { return vf_load_i8_n(p, W); }

#endif

#if defined(AE_LEVEL_AVX512BF16)
#define BF16_DOT
typedef __m512bh bf16_pair;
AE_INLINE bf16_pair bf16_pair_of(int32_t bits) { return (__m512bh)_mm512_set1_epi32(bits); }
AE_INLINE vf bf16_dot(vf sum, bf16_pair a, vi b) { return _mm512_dpbf16_ps(sum, a, (__m512bh)b); }
/* W numbers rounded to bf16 for it; subnormal ones, which it takes for zeros, may become zeros. */
AE_INLINE void bf16_put(uint16_t *p, vf x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
/* Words of a bf16 of `low` and one of `high`. */
AE_INLINE vi vi_pairs(const char *low, const char *high) {
    const vi a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)low));
    const vi b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)high));
    return a | _mm512_slli_epi32(b, 16);
}
#endif

#if !defined(AE_LEVEL_NEON)
typedef vf vs;
AE_INLINE vs vs_load(const float *p) { return vf_set(*p); }
AE_INLINE vf vs_fma(vs a, vf b, vf c) {
#if defined(AE_LEVEL_AVX512) /* In assembly: gcc 12 copies sums before it adds to them, until registers run out. */
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    return vf_fma(a, b, c);
#endif
}
#endif

/* 2^x within 2e-7 of itself for -126 <= x <= 0: the weights of a softmax. 2^-inf = 0, NaN stays NaN; the
 * operand order of max lets it through. x = n + r with |r| <= 1/2; the polynomial is the minimax one for 2^r
 * whose constant term is 1. */
AE_INLINE vf vf_exp2(vf x) {
    x = vf_max(vf_set(-150.0f), x);
    vf n = vf_round(x), r = vf_sub(x, n);
    vf p = vf_set(1.3264727214e-03f);
    p = vf_fma(p, r, vf_set(9.6715128125e-03f));
    p = vf_fma(p, r, vf_set(5.5507337448e-02f));
    p = vf_fma(p, r, vf_set(2.4022242083e-01f));
    p = vf_fma(p, r, vf_set(6.9314697760e-01f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_scale2(p, n);
}

/* e^x within 2 ulp of results that are not subnormal: exp(-inf) = 0, overflow gives inf, NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln(2)/2; the polynomial for e^r is that of Cephes' expf. The operand order of
 * max and min lets a NaN through. */
AE_INLINE vf vf_exp(vf x) {
    x = vf_min(vf_set(89.0f), vf_max(vf_set(-104.0f), x));
    vf n = vf_round(vf_mul(x, vf_set(1.44269504088896341f)));
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set(1.0f));
    return vf_scale2(p, n);
}
