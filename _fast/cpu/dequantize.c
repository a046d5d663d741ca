/* Block layouts, all little endian, d and m being half-precision scale and minimum:
 *   Q8_0   32 values: d, int8 q[32]                    x = d q
 *   Q4_0   32 values: d, q[16]                         x = d (q - 8)
 *   Q4_1   32 values: d, m, q[16]                      x = d q + m
 *   Q5_0   32 values: d, h[4], q[16]                   x = d (q - 16)
 *   Q5_1   32 values: d, m, h[4], q[16]                x = d q + m
 *          value i < 16 is the low nibble of q[i], value i + 16 the high one; bit i of h is value i's bit 4
 *   Q4_K   256 values in 8 groups: d, m, scales[12], q[128]          x = d s[g] q - m t[g]
 *   Q5_K   256 values in 8 groups: d, m, scales[12], h[32], q[128]   the same, bit g of h[i] is q's bit 4
 *          groups 2p and 2p + 1 are the low and high nibbles of q[32p .. 32p + 32)
 *   Q6_K   256 values in 16 groups: l[128], h[64], int8 s[16], d     x = d s[g] (q - 32)
 *          each half of 128 values: 4 lots of 32; value i of lot v has its low 4 bits in nibble v / 2 of
 *          l[i + 32 (v % 2)] and its upper 2 bits at bit 2v of h[i]
 */
#include "dequantize.h"

#include <string.h>

#include "half.h"

#define MAX_BLOCK 256

typedef struct format {
    int block, bytes;
    void (*decode)(float *restrict out, const uint8_t *restrict b);
    ae_coding coding;
} format;

static float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return ae_f16_to_f32(h);
}

static void q8_0(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b);
    const int8_t *q = (const int8_t *)(b + 2);
    for (int i = 0; i < 32; i++) out[i] = d * q[i];
}

static void q4_0(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b);
    const uint8_t *q = b + 2;
    for (int i = 0; i < 16; i++) {
        out[i] = d * ((q[i] & 15) - 8);
        out[i + 16] = d * ((q[i] >> 4) - 8);
    }
}

static void q4_1(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b), m = half_at(b + 2);
    const uint8_t *q = b + 4;
    for (int i = 0; i < 16; i++) {
        out[i] = d * (q[i] & 15) + m;
        out[i + 16] = d * (q[i] >> 4) + m;
    }
}

static int fifth_bit(const uint8_t *h, int i) { return (h[i / 8] >> i % 8 & 1) << 4; }

static void q5_0(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b);
    const uint8_t *h = b + 2, *q = b + 6;
    for (int i = 0; i < 16; i++) {
        out[i] = d * ((q[i] & 15) + fifth_bit(h, i) - 16);
        out[i + 16] = d * ((q[i] >> 4) + fifth_bit(h, i + 16) - 16);
    }
}

static void q5_1(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b), m = half_at(b + 2);
    const uint8_t *h = b + 4, *q = b + 8;
    for (int i = 0; i < 16; i++) {
        out[i] = d * ((q[i] & 15) + fifth_bit(h, i)) + m;
        out[i + 16] = d * ((q[i] >> 4) + fifth_bit(h, i + 16)) + m;
    }
}

/* Six-bit scale and minimum of group g out of the 12 bytes of Q4_K and Q5_K: groups 0-3 lie in the low six
 * bits of bytes g and g + 4; groups 4-7 in the nibbles of byte g + 4, their top bits above those of 0-3. */
static void k_scale(const uint8_t *s, int g, int *scale, int *minimum) {
    if (g < 4) {
        *scale = s[g] & 63;
        *minimum = s[g + 4] & 63;
    } else {
        *scale = (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
        *minimum = (s[g + 4] >> 4) | (s[g] >> 6) << 4;
    }
}

static void q4_k(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int g = 0; g < 8; g++) {
        int scale, minimum, shift = g % 2 * 4;
        k_scale(b + 4, g, &scale, &minimum);
        const float ds = d * scale, mt = m * minimum;
        const uint8_t *q = b + 16 + g / 2 * 32;
        for (int i = 0; i < 32; i++) out[g * 32 + i] = ds * ((q[i] >> shift) & 15) - mt;
    }
}

static void q5_k(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b), m = half_at(b + 2);
    const uint8_t *h = b + 16;
    for (int g = 0; g < 8; g++) {
        int scale, minimum, shift = g % 2 * 4;
        k_scale(b + 4, g, &scale, &minimum);
        const float ds = d * scale, mt = m * minimum;
        const uint8_t *q = b + 48 + g / 2 * 32;
        for (int i = 0; i < 32; i++)
            out[g * 32 + i] = ds * (((q[i] >> shift) & 15) | ((h[i] >> g) & 1) << 4) - mt;
    }
}

static void q6_k(float *restrict out, const uint8_t *restrict b) {
    const float d = half_at(b + 208);
    for (int lot = 0; lot < 8; lot++) {
        const int half = lot / 4, v = lot % 4;
        const uint8_t *l = b + half * 64 + v % 2 * 32, *h = b + 128 + half * 32;
        const int8_t *s = (const int8_t *)(b + 192) + lot * 2;
        const float ds[2] = {d * s[0], d * s[1]};
        for (int i = 0; i < 32; i++) {
            int q = ((l[i] >> v / 2 * 4) & 15) | ((h[i] >> 2 * v) & 3) << 4;
            out[lot * 32 + i] = ds[i / 16] * (q - 32);
        }
    }
}

static const format formats[AE_NUM_SOURCE_TYPES] = {
    [AE_SRC_F32] = {1, 4, NULL, {0, 0}},       [AE_SRC_BF16] = {1, 2, NULL, {0, 0}},
    [AE_SRC_F16] = {1, 2, NULL, {0, 0}},       [AE_SRC_Q8_0] = {32, 34, q8_0, {8, 128}},
    [AE_SRC_Q4_0] = {32, 18, q4_0, {4, 8}},    [AE_SRC_Q4_1] = {32, 20, q4_1, {4, -1}},
    [AE_SRC_Q5_0] = {32, 22, q5_0, {5, 16}},   [AE_SRC_Q5_1] = {32, 24, q5_1, {5, -1}},
    [AE_SRC_Q4_K] = {256, 144, q4_k, {4, -1}}, [AE_SRC_Q5_K] = {256, 176, q5_k, {5, -1}},
    [AE_SRC_Q6_K] = {256, 210, q6_k, {0, 0}},
};

int ae_source_block(int type) { return formats[type].block; }

int64_t ae_source_bytes(int type, int64_t count) { return count / formats[type].block * formats[type].bytes; }

static void plain(float *restrict out, const uint8_t *restrict p, int type, int64_t count) {
    if (type == AE_SRC_F32) {
        memcpy(out, p, (size_t)count * 4);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t h;
        memcpy(&h, p + 2 * i, 2);
        out[i] = type == AE_SRC_BF16 ? ae_bf16_to_f32(h) : ae_f16_to_f32(h);
    }
}

void ae_dequantize(float *out, const void *row, int type, int64_t start, int64_t count) {
    const format *f = &formats[type];
    const uint8_t *block = (const uint8_t *)row + start / f->block * f->bytes;
    if (f->decode == NULL) {
        plain(out, block, type, count);
        return;
    }
    for (int64_t skip = start % f->block; count > 0; skip = 0, block += f->bytes) {
        int64_t n = f->block - skip < count ? f->block - skip : count;
        if (n == f->block) {
            f->decode(out, block);
        } else {
            float whole[MAX_BLOCK];
            f->decode(whole, block);
            memcpy(out, whole + skip, (size_t)n * sizeof *out);
        }
        out += n;
        count -= n;
    }
}

ae_coding ae_source_coding(int type) { return formats[type].coding; }

void ae_source_scale(float *scale, float *minimum, const void *row, int type, int64_t start) {
    const format *f = &formats[type];
    const uint8_t *b = (const uint8_t *)row + start / f->block * f->bytes;
    *scale = half_at(b);
    if (f->coding.zero >= 0) {
        *minimum = -(float)f->coding.zero * *scale;
    } else if (f->block == 32) {
        *minimum = half_at(b + 2);
    } else {
        int s, m;
        k_scale(b + 4, (int)(start % f->block / 32), &s, &m);
        *scale *= (float)s;
        *minimum = -half_at(b + 2) * (float)m;
    }
}
