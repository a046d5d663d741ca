/* Integer dot products on top of simd.h: `vi` holds W lanes of 32 bits, in each of which four unsigned bytes
 * (codes of weights) meet four signed ones (activations). Where only signed bytes can be multiplied, codes_of
 * takes CODES_ZERO from each byte; nibbles are signed bytes as they are.
 *
 * Sums start from INT_BIAS; vi_biased() gives INT_BIAS_FLOAT + sum, exact while |sum| < 2^22. The bias lies
 * in the middle of a range where floats are one apart, so that the bits of a biased sum are that float's: no
 * conversion, and a fused multiply-add takes the bias out again. (Where that is not fused there is no bias.)
 *
 * 4-bit codes of whole rows stand for bytes, least + step * code (quantized.h). `steps` holds both for W
 * outputs, the step in either half of a lane: so it multiplies two codes at once, for no result passes a byte.
 *
 * dot_signed() has it the other way round: signed bytes in x, and four unsigned ones for all lanes.
 *
 * vi_quads() puts the bytes of four rows that stand below each other into a lane; vi_store_bytes() stores the two
 * bytes of lanes of 16 bits apart.
 *
 * vi_choose() takes bytes of a table of sixteen, as vi_table() has it, by numbers below 16. vi_zip_low() and
 * vi_zip_high() have bytes of a and b take turns: the first and the last eight of every sixteen.
 *
 * dot() is exact at every level. Without VNNI the bytes are widened to 16 bits, even and odd ones apart: the
 * instruction that multiplies bytes directly would saturate.
 */
#pragma once
#include "simd.h"

/* Levels of which the processor has the dot product of unsigned and signed bytes. */
#if defined(AE_LEVEL_AVX512VNNI) || defined(AE_LEVEL_AVXVNNI) || defined(AE_LEVEL_NEONBF16)
#define INT_DOT
#endif

#if defined(AE_LEVEL_AVX512) || defined(AE_LEVEL_AVX2)
typedef struct steps { vi step, step_high, least; } steps;
#endif

#if defined(AE_LEVEL_AVX512)

#define INT_BIAS 0x4B400000
#define INT_BIAS_FLOAT 12582912.0f
AE_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
AE_INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
AE_INLINE vf vi_biased(vi a) { return _mm512_castsi512_ps(a); }
AE_INLINE vf vi_to_vf(vi a) { return _mm512_cvtepi32_ps(a); }
AE_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
AE_INLINE vi vi_quads(const char *const row[4]) {
    /* The rows side by side; then their words, four by four; then, in these, the bytes. */
    vi v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row[0]));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)row[1]), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)row[2]), 2);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)row[3]), 3);
    const vi words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const vi bytes = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, v), bytes);
}
AE_INLINE void vi_store_bytes(uint8_t *high, uint8_t *low, vi a) {
    _mm_storeu_si128((__m128i *)high, _mm512_cvtepi32_epi8(_mm512_srli_epi32(a, 8)));
    _mm_storeu_si128((__m128i *)low, _mm512_cvtepi32_epi8(a));
}
AE_INLINE vi vi_table(const uint8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
}
AE_INLINE vi vi_choose(vi table, vi choice) { return _mm512_shuffle_epi8(table, choice); }
AE_INLINE vi vi_zip_low(vi a, vi b) { return _mm512_unpacklo_epi8(a, b); }
AE_INLINE vi vi_zip_high(vi a, vi b) { return _mm512_unpackhi_epi8(a, b); }
AE_INLINE vi vi_low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
AE_INLINE vi vi_high_nibbles(vi a) { return vi_low_nibbles(_mm512_srli_epi16(a, 4)); }
AE_INLINE steps steps_of(const uint8_t *p) {
    const vi both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    const vi second = _mm512_set4_epi32((int)0x800D800D, (int)0x80098009, (int)0x80058005, (int)0x80018001);
    const vi step = _mm512_shuffle_epi8(both, second);
    const vi least = _mm512_shuffle_epi8(both, _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
    return (steps){step, _mm512_slli_epi16(step, 12), least};
}
AE_INLINE vi vi_low_codes(vi a, steps s) {
    return _mm512_add_epi8(_mm512_mullo_epi16(vi_low_nibbles(a), s.step), s.least);
}
AE_INLINE vi vi_high_codes(vi a, steps s) {
    const vi high = _mm512_and_si512(a, _mm512_set1_epi8((char)0xF0));
    return _mm512_add_epi8(_mm512_mulhi_epu16(high, s.step_high), s.least);
}

#if defined(AE_LEVEL_AVX512VNNI)
typedef vi codes;
typedef vi signed4;
AE_INLINE codes codes_of(vi bytes) { return bytes; }
AE_INLINE signed4 signed4_set(int32_t bytes) { return vi_set(bytes); }
/* In assembly, with the operands in place: gcc 12 copies every sum before it adds to it, and where sums start
 * from the same value. */
AE_INLINE vi vi_fetch(const void *p) {
    vi a;
    __asm__("vmovdqu64 %1, %0" : "=v"(a) : "m"(*(const vi *)p));
    return a;
}
AE_INLINE vi vi_start(const int32_t *x) {
    vi a;
    __asm__("vpbroadcastd %1, %0" : "=v"(a) : "m"(*x));
    return a;
}
AE_INLINE vi dot(vi sum, codes w, signed4 x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
AE_INLINE vi dot_signed(vi sum, vi x, signed4 w) { return dot(sum, w, x); }
AE_INLINE vf add_scaled(vf total, vi sum, vf d, vf biased, const float *scale) {
    vf y = vi_biased(sum);
    __asm__("vfmadd132ps %1, %2, %0" : "+v"(y) : "v"(d), "v"(biased));
    __asm__("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(total) : "m"(*scale), "v"(y));
    return total;
}
#else
typedef struct codes { vi even, odd; } codes;
typedef struct signed4 { vi even, odd; } signed4;
AE_INLINE codes codes_of(vi bytes) {
    return (codes){_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)};
}
AE_INLINE signed4 signed4_set(int32_t bytes) {
    vi x = vi_set(bytes);
    return (signed4){_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
AE_INLINE vi dot(vi sum, codes w, signed4 x) {
    sum = vi_add(sum, _mm512_madd_epi16(w.even, x.even));
    return vi_add(sum, _mm512_madd_epi16(w.odd, x.odd));
}
#endif

#elif defined(AE_LEVEL_AVX2)

#define INT_BIAS 0x4B400000
#define INT_BIAS_FLOAT 12582912.0f
AE_INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
AE_INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
AE_INLINE vf vi_biased(vi a) { return _mm256_castsi256_ps(a); }
AE_INLINE vf vi_to_vf(vi a) { return _mm256_cvtepi32_ps(a); }
AE_INLINE vi vi_quads(const char *const row[4]) {
    const vi a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)row[0]));
    const vi b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)row[1]));
    const vi c = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)row[2]));
    const vi d = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)row[3]));
    return (a | _mm256_slli_epi32(b, 8)) | (_mm256_slli_epi32(c, 16) | _mm256_slli_epi32(d, 24));
}
AE_INLINE void vi_store_bytes(uint8_t *high, uint8_t *low, vi a) {
    const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i bytes = _mm_packus_epi16(_mm_srli_epi16(h, 8), _mm_and_si128(h, _mm_set1_epi16(255)));
    _mm_storel_epi64((__m128i *)high, bytes);
    _mm_storel_epi64((__m128i *)low, _mm_unpackhi_epi64(bytes, bytes));
}
AE_INLINE vi vi_table(const uint8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
}
AE_INLINE vi vi_choose(vi table, vi choice) { return _mm256_shuffle_epi8(table, choice); }
AE_INLINE vi vi_zip_low(vi a, vi b) { return _mm256_unpacklo_epi8(a, b); }
AE_INLINE vi vi_zip_high(vi a, vi b) { return _mm256_unpackhi_epi8(a, b); }
AE_INLINE vi vi_low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
AE_INLINE vi vi_high_nibbles(vi a) { return vi_low_nibbles(_mm256_srli_epi16(a, 4)); }
AE_INLINE steps steps_of(const uint8_t *p) {
    const vi both = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    const vi step = _mm256_mullo_epi32(_mm256_srli_epi32(both, 8), _mm256_set1_epi32(0x10001));
    const vi least = _mm256_and_si256(both, _mm256_set1_epi32(255));
    return (steps){step, _mm256_slli_epi16(step, 12), _mm256_mullo_epi32(least, _mm256_set1_epi32(0x1010101))};
}
AE_INLINE vi vi_low_codes(vi a, steps s) {
    return _mm256_add_epi8(_mm256_mullo_epi16(vi_low_nibbles(a), s.step), s.least);
}
AE_INLINE vi vi_high_codes(vi a, steps s) {
    const vi high = _mm256_and_si256(a, _mm256_set1_epi8((char)0xF0));
    return _mm256_add_epi8(_mm256_mulhi_epu16(high, s.step_high), s.least);
}

#if defined(AE_LEVEL_AVXVNNI)
typedef vi codes;
typedef vi signed4;
AE_INLINE codes codes_of(vi bytes) { return bytes; }
AE_INLINE signed4 signed4_set(int32_t bytes) { return vi_set(bytes); }
AE_INLINE vi dot(vi sum, codes w, signed4 x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
AE_INLINE vi dot_signed(vi sum, vi x, signed4 w) { return dot(sum, w, x); }
#else
typedef struct codes { vi even, odd; } codes;
typedef struct signed4 { vi even, odd; } signed4;
AE_INLINE codes codes_of(vi bytes) {
    return (codes){_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
AE_INLINE signed4 signed4_set(int32_t bytes) {
    vi x = vi_set(bytes);
    return (signed4){_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
AE_INLINE vi dot(vi sum, codes w, signed4 x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
}
#endif

#else /* four lanes */

typedef uint8_t vbytes __attribute__((vector_size(16)));
typedef uint16_t vwords __attribute__((vector_size(16)));
typedef struct steps { vi step, least; } steps;

AE_INLINE vi vi_set(int32_t x) { return (vi){x, x, x, x}; }
AE_INLINE void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
AE_INLINE vf vi_to_vf(vi a) { return __builtin_convertvector(a, vf); }
AE_INLINE vi vi_quads(const char *const row[4]) {
    vbytes rows;
    EACH(r, 4) memcpy((char *)&rows + 4 * r, row[r], 4);
#if defined(__clang__)
    return (vi)__builtin_shufflevector(rows, rows, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#else
    return (vi)__builtin_shuffle(rows, (vbytes){0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
#endif
}
AE_INLINE void vi_store_bytes(uint8_t *high, uint8_t *low, vi a) {
    EACH(i, W) high[i] = (uint8_t)(a[i] >> 8), low[i] = (uint8_t)a[i];
}
AE_INLINE vi vi_table(const uint8_t *p) { return vi_load(p); }
#if defined(AE_LEVEL_NEON)
AE_INLINE vi vi_choose(vi table, vi choice) { return (vi)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)choice); }
AE_INLINE vi vi_zip_low(vi a, vi b) { return (vi)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b); }
AE_INLINE vi vi_zip_high(vi a, vi b) { return (vi)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b); }
#else
AE_INLINE vi vi_choose(vi table, vi choice) {
    vbytes out;
    EACH(i, 16) out[i] = ((vbytes)table)[((vbytes)choice)[i]];
    return (vi)out;
}
AE_INLINE vi vi_zip_low(vi a, vi b) {
    vbytes out;
    EACH(i, 8) out[2 * i] = ((vbytes)a)[i], out[2 * i + 1] = ((vbytes)b)[i];
    return (vi)out;
}
AE_INLINE vi vi_zip_high(vi a, vi b) {
    vbytes out;
    EACH(i, 8) out[2 * i] = ((vbytes)a)[8 + i], out[2 * i + 1] = ((vbytes)b)[8 + i];
    return (vi)out;
}
#endif
AE_INLINE vi vi_low_nibbles(vi a) { return (vi)((vbytes)a & 15); }
AE_INLINE vi vi_high_nibbles(vi a) { return (vi)((vbytes)a >> 4); }
AE_INLINE steps steps_of(const uint8_t *p) {
    vh halves;
    memcpy(&halves, p, sizeof halves);
    const vu both = __builtin_convertvector(halves, vu);
    return (steps){(vi)((both >> 8) * 0x10001), (vi)((both & 255) * 0x1010101)};
}
AE_INLINE vi codes_in_steps(vi nibbles, steps s) {
    return (vi)((vbytes)((vwords)nibbles * (vwords)s.step) + (vbytes)s.least);
}
AE_INLINE vi vi_low_codes(vi a, steps s) { return codes_in_steps(vi_low_nibbles(a), s); }
AE_INLINE vi vi_high_codes(vi a, steps s) { return codes_in_steps(vi_high_nibbles(a), s); }

#if defined(AE_LEVEL_NEON)

#define INT_BIAS 0x4B400000
#define INT_BIAS_FLOAT 12582912.0f
AE_INLINE vf vi_biased(vi a) { return (vf)a; }

typedef vi codes;
#if defined(AE_LEVEL_NEONBF16)
AE_INLINE codes codes_of(vi bytes) { return bytes; }
#else
#define CODES_ZERO 128
AE_INLINE codes codes_of(vi bytes) { return (vi)((vbytes)bytes ^ 128); }
AE_INLINE codes codes_of_nibbles(vi bytes) { return bytes; }
#endif

#if defined(AE_LEVEL_NEONDOT)
/* In assembly, because clang before 16 has the intrinsics only where the whole file is for their target. Four
 * bytes in a scalar register multiply all lanes. */
typedef float signed4;
AE_INLINE signed4 signed4_set(int32_t bytes) { return ae_bits_f32((uint32_t)bytes); }
AE_INLINE vi dot(vi sum, codes w, signed4 x) {
#if defined(AE_LEVEL_NEONBF16)
    __asm__("usdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(w), "w"(x));
#else
    __asm__("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(w), "w"(x));
#endif
    return sum;
}
#if defined(AE_LEVEL_NEONBF16)
AE_INLINE vi dot_signed(vi sum, vi x, signed4 w) {
    __asm__("sudot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(x), "w"(w));
    return sum;
}
#endif
#else
typedef int8x16_t signed4;
AE_INLINE signed4 signed4_set(int32_t bytes) { return (int8x16_t)vi_set(bytes); }
/* Two products fit 16 bits, for activations are never -128: 2 * 128 * 127 < 2^15. */
AE_INLINE vi dot(vi sum, codes w, signed4 x) {
    const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8(x));
    const int16x8_t high = vmull_high_s8((int8x16_t)w, x);
    return (vi)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
}
#endif

#else /* portable */

#define INT_BIAS 0
#define INT_BIAS_FLOAT 0.0f
AE_INLINE vf vi_biased(vi a) { return __builtin_convertvector(a, vf); }

typedef struct codes { vi byte[4]; } codes;
typedef struct signed4 { int32_t byte[4]; } signed4;
AE_INLINE codes codes_of(vi bytes) {
    vu u = (vu)bytes;
    return (codes){{(vi)(u & 255), (vi)(u >> 8 & 255), (vi)(u >> 16 & 255), (vi)(u >> 24)}};
}
AE_INLINE signed4 signed4_set(int32_t bytes) {
    int8_t b[4];
    memcpy(b, &bytes, 4);
    return (signed4){{b[0], b[1], b[2], b[3]}};
}
AE_INLINE vi dot(vi sum, codes w, signed4 x) {
    for (int i = 0; i < 4; i++) sum += w.byte[i] * x.byte[i];
    return sum;
}
#endif

#endif

#if !defined(CODES_ZERO)
#define CODES_ZERO 0
AE_INLINE codes codes_of_nibbles(vi bytes) { return codes_of(bytes); }
#endif

#if !defined(AE_LEVEL_AVX512VNNI)
AE_INLINE vi vi_fetch(const void *p) { return vi_load(p); }
AE_INLINE vi vi_start(const int32_t *x) { return vi_set(*x); }

/* total + (sum - INT_BIAS_FLOAT) * d * scale, with biased = -INT_BIAS_FLOAT * d */
AE_INLINE vf add_scaled(vf total, vi sum, vf d, vf biased, const float *scale) {
    return vs_fma(vs_load(scale), vf_fma(vi_biased(sum), d, biased), total);
}
#endif
