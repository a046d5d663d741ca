/* Scalar conversions between float32 and the 16-bit types; rounding is to nearest even. */
#pragma once
#include <stdint.h>
#include <string.h>

static inline float ae_bits_f32(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t ae_f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float ae_bf16_to_f32(uint16_t h) { return ae_bits_f32((uint32_t)h << 16); }

static inline uint16_t ae_f32_to_bf16(float f) {
    uint32_t u = ae_f32_bits(f);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

/* The half's exponent and mantissa, moved into place and scaled by 2^112, are the value: subnormals
 * included. Only infinity and NaN need the exponent completed. */
static inline float ae_f16_to_f32(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t u = ae_f32_bits(ae_bits_f32(magnitude) * 0x1p112f);
    u = magnitude >= 0x0F800000u ? (magnitude | 0x7F800000u) : u;
    return ae_bits_f32(u | sign);
}

static inline uint16_t ae_f32_to_f16(float f) {
    uint32_t u = ae_f32_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
    uint32_t h;
    if (a > 0x7F800000u)
        h = 0x7E00u | ((a >> 13) & 0x3FFu);
    else if (a >= 0x477FF000u) /* 65520 and above round to infinity */
        h = 0x7C00u;
    else if (a < 0x38800000u) /* below 2^-14: adding 0.5 leaves the subnormal in the low bits, rounded */
        h = ae_f32_bits(ae_bits_f32(a) + 0.5f) - 0x3F000000u;
    else
        h = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1)) >> 13;
    return (uint16_t)(sign | h);
}
