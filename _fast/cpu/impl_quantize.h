/* float32 rows to quantized and rounded rows (quantized.h). A group is rounded by itself: whoever computes whole groups
 * of a row may write them. */
#pragma once
#include "impl_rotate.h"
#include "quantized.h"
#include "simd.h"

/* Below this the reciprocal of the scale would overflow; such a group counts as zeros. */
#define LEAST_PEAK 0x1p-120f
#define INFINITE_BITS 0x7F800000

/* The bits of |x| order like the numbers, infinity and NaN above all. */
#if defined(AE_LEVEL_AVX512)
AE_INLINE vi peak_zero(void) { return _mm512_setzero_si512(); }
AE_INLINE vi peak_max(vi peak, vf x) {
    return _mm512_max_epi32(peak, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
AE_INLINE int32_t peak_of(vi peak) { return _mm512_reduce_max_epi32(peak); }
AE_INLINE vi to_codes(vf x) { return _mm512_cvtps_epi32(x); }
AE_INLINE void store_codes(int8_t *q, vi codes) {
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(codes));
}
AE_INLINE vi codes_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
AE_INLINE int32_t codes_sum(vi a) { return _mm512_reduce_add_epi32(a); }
AE_INLINE void store_codes4(int8_t *q, const vi *codes) {
    const vi low = _mm512_packs_epi32(codes[0], codes[1]), high = _mm512_packs_epi32(codes[2], codes[3]);
    const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}
#elif defined(AE_LEVEL_AVX2)
AE_INLINE vi peak_zero(void) { return _mm256_setzero_si256(); }
AE_INLINE vi peak_max(vi peak, vf x) {
    return _mm256_max_epi32(peak, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF)));
}
AE_INLINE int32_t peak_of(vi peak) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(peak), _mm256_extracti128_si256(peak, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
AE_INLINE vi to_codes(vf x) { return _mm256_cvtps_epi32(x); }
AE_INLINE void store_codes(int8_t *q, vi codes) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((__m128i *)q, _mm_packs_epi16(words, words));
}
AE_INLINE vi codes_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
AE_INLINE int32_t codes_sum(vi a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
#elif defined(AE_LEVEL_NEON)
AE_INLINE vi peak_zero(void) { return (vi){0}; }
AE_INLINE vi peak_max(vi peak, vf x) {
    return (vi)vmaxq_s32((int32x4_t)peak, (int32x4_t)((vi)x & 0x7FFFFFFF));
}
AE_INLINE int32_t peak_of(vi peak) { return vmaxvq_s32((int32x4_t)peak); }
AE_INLINE vi to_codes(vf x) { return (vi)vcvtnq_s32_f32(x); }
AE_INLINE void store_codes(int8_t *q, vi codes) {
    const int16x4_t words = vmovn_s32((int32x4_t)codes);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(q, &bytes, W);
}
AE_INLINE vi codes_add(vi a, vi b) { return a + b; }
AE_INLINE int32_t codes_sum(vi a) { return vaddvq_s32((int32x4_t)a); }
#else
AE_INLINE vi peak_zero(void) { return (vi){0}; }
AE_INLINE vi peak_max(vi peak, vf x) {
    vi bits = (vi)x & 0x7FFFFFFF, more = bits > peak;
    return (bits & more) | (peak & ~more);
}
AE_INLINE int32_t peak_of(vi peak) {
    int32_t a = peak[0] > peak[1] ? peak[0] : peak[1], b = peak[2] > peak[3] ? peak[2] : peak[3];
    return a > b ? a : b;
}
AE_INLINE vi to_codes(vf x) { return __builtin_convertvector(vf_round(x), vi); }
AE_INLINE void store_codes(int8_t *q, vi codes) {
    for (int i = 0; i < W; i++) q[i] = (int8_t)codes[i];
}
AE_INLINE vi codes_add(vi a, vi b) { return a + b; }
AE_INLINE int32_t codes_sum(vi a) { return (a[0] + a[1]) + (a[2] + a[3]); }
#endif

#if !defined(AE_LEVEL_AVX512)
AE_INLINE void store_codes4(int8_t *q, const vi *codes) { EACH(j, 4) store_codes(q + j * W, codes[j]); }
#endif

/* x[i .. i + W), zeros from n on. */
#define VECTOR_OF(x, i, n) \
    ((n) - (i) >= W ? vf_load((x) + (i)) : (n) - (i) > 0 ? vf_load_n((x) + (i), (int)((n) - (i))) : vf_zero())

/* The bits of the largest |x| of n values, of which zeros fill up `width`. */
AE_INLINE int32_t peak_bits(const float *x, int64_t n, const int64_t width) {
    vi peaks = peak_zero();
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) EACH(j, 4) peaks = peak_max(peaks, vf_load(x + i + j * W));
    for (; i < width; i += W) peaks = peak_max(peaks, VECTOR_OF(x, i, n));
    return peak_of(peaks);
}

/* n values of a group as `group` codes. */
AE_INLINE void quantize_group(int8_t *q, float *scale, int32_t *sum, const float *x, int64_t n,
                              const int64_t group) {
    vi sums = peak_zero();
    const int32_t bits = peak_bits(x, n, group);
    const float peak = ae_bits_f32((uint32_t)bits);
    if (bits >= INFINITE_BITS || peak < LEAST_PEAK) {
        memset(q, 0, (size_t)group);
        *scale = bits >= INFINITE_BITS ? NAN : 0.0f;
        *sum = 0;
        return;
    }
    const vf inverse = vf_set(127.0f / peak);
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        vi codes[4];
        EACH(j, 4) codes[j] = to_codes(vf_mul(vf_load(x + i + j * W), inverse));
        EACH(j, 4) sums = codes_add(sums, codes[j]);
        store_codes4(q + i, codes);
    }
    for (; i < group; i += W) {
        const vi codes = to_codes(vf_mul(VECTOR_OF(x, i, n), inverse));
        store_codes(q + i, codes);
        sums = codes_add(sums, codes);
    }
    *scale = peak / 127.0f;
    *sum = codes_sum(sums);
}

AE_INLINE void quantize_run(int8_t *row8, const float *x, int64_t k, int64_t begin, int64_t end,
                            const int group) {
    float *scales = ae_row8_scales(row8, k, group);
    int32_t *sums = ae_row8_sums(row8, k, group);
    int64_t at = begin, g = begin / group;
    for (; at + group <= end; at += group, g++)
        quantize_group(row8 + at, scales + g, sums + g, x + at - begin, group, group);
    if (at < end) quantize_group(row8 + at, scales + g, sums + g, x + at - begin, end - at, group);
}

/* x [n] in bfloat16, a zero behind an odd end. */
static void round_run(uint16_t *out, const float *x, int64_t n) {
    int64_t i = 0;
#if defined(BF16_DOT)
    for (; i + W <= n; i += W) bf16_put(out + i, vf_load(x + i));
#endif
    for (; i < n; i += W) {
        const int left = n - i < W ? (int)(n - i) : W;
        vf_store_bf16_n(out + i, vf_load_n(x + i, left), (left + 1) & ~1);
    }
}

/* Columns [begin, end) of a row of k columns, whole groups (the row's last one may be short), or pairs. `row8` is the
 * start of the row, `x` the value of column `begin`. */
static inline void quantize_groups(int8_t *row8, const float *x, int64_t k, int64_t group, int64_t begin,
                                   int64_t end) {
    if (group == AE_ROUNDED)
        round_run((uint16_t *)row8 + begin, x, end - begin);
    else if (group == 32)
        quantize_run(row8, x, k, begin, end, 32);
    else if (group == 64)
        quantize_run(row8, x, k, begin, end, 64);
    else
        quantize_run(row8, x, k, begin, end, 128);
}

/* k values in 8 bits, with one scale. */
static void quantize_bytes(int8_t *row8, const float *x, int64_t k) {
    quantize_group(row8, ae_row8_scales(row8, k, AE_WHOLE), ae_row8_sums(row8, k, AE_WHOLE), x, k,
                   ae_group_width(k, AE_WHOLE));
}

/* k values in 16 bits. */
static void quantize_pairs(int8_t *row8, const float *x, int64_t k) {
    const int64_t width = ae_group_width(k, AE_WHOLE16);
    float *scale = ae_row8_scales(row8, k, AE_WHOLE16);
    int32_t *sums = ae_row8_sums(row8, k, AE_WHOLE16);
    vi high_sum = peak_zero(), low_sum = peak_zero();
    const int32_t bits = peak_bits(x, k, width);
    const float peak = ae_bits_f32((uint32_t)bits);
    if (bits >= INFINITE_BITS || peak < LEAST_PEAK) {
        memset(row8, 0, (size_t)(2 * width));
        *scale = bits >= INFINITE_BITS ? NAN : 0.0f;
        sums[0] = sums[1] = 0;
        return;
    }
    const vf in_highs = vf_set((float)AE_MOST16 / AE_HIGH / peak), in_lows = vf_set(AE_MOST16 / peak);
    for (int64_t i = 0; i < width; i += W) {
        const vf v = VECTOR_OF(x, i, k), high = vf_round(vf_mul(v, in_highs));
        const vi h = to_codes(high), l = to_codes(vf_fma(high, vf_set(-AE_HIGH), vf_mul(v, in_lows)));
        store_codes(row8 + i, h);
        store_codes(row8 + width + i, l);
        high_sum = codes_add(high_sum, h);
        low_sum = codes_add(low_sum, l);
    }
    *scale = peak / AE_MOST16;
    sums[0] = codes_sum(high_sum);
    sums[1] = codes_sum(low_sum);
}

/* A whole row, rotated; `rotated`, which may be x, is left so. */
static void quantize_whole(int8_t *row8, float *rotated, const float *x, int64_t k, int64_t group) {
    rotate_row(rotated, x, k);
    if (group == AE_WHOLE16)
        quantize_pairs(row8, rotated, k);
    else
        quantize_bytes(row8, rotated, k);
}

/* `spare` is memory for k floats. */
static inline void quantize_row(int8_t *row8, const float *x, int64_t k, int64_t group, float *spare) {
    if (ae_is_whole(group))
        quantize_whole(row8, spare, x, k, group);
    else
        quantize_groups(row8, x, k, group, 0, k);
}

static void k_quantize(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    enum { CHUNK = 2048 };
    const int64_t k = op->n[0], group = op->n[3], chunks = (k + CHUNK - 1) / CHUNK;
    const int64_t bytes = ae_row8_bytes(k, group);
    int64_t lo, hi;
    if (ae_is_whole(group)) {
        ae_share(thread, ae_rows_of(op, step), 1, &lo, &hi);
        for (int64_t m = lo; m < hi; m++) {
            const float *x = (const float *)op->p[1] + m * k;
            if (m + 1 < hi) ae_prefetch(x + k, k);
            quantize_row((int8_t *)op->p[4] + m * bytes, x, k, group, thread->scratch);
        }
        return;
    }
    ae_share(thread, ae_rows_of(op, step) * chunks, 1, &lo, &hi);
    for (int64_t unit = lo; unit < hi; unit++) {
        const int64_t m = unit / chunks, begin = unit % chunks * CHUNK;
        const int64_t end = begin + CHUNK < k ? begin + CHUNK : k;
        const float *x = (const float *)op->p[1] + m * k;
        quantize_groups((int8_t *)op->p[4] + m * bytes, x + begin, k, group, begin, end);
    }
}

#undef INFINITE_BITS
#undef VECTOR_OF
