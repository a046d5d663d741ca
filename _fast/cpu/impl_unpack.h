/* One row of a packed weight as floats: embedding tables that share the head's memory. */
#pragma once
#include "compact.h"
#include "impl_rotate.h"
#include "pack.h"
#include "simd.h"

AE_INLINE float unpacked(const void *p, int type) {
    uint16_t h;
    if (type == AE_F32) return *(const float *)p;
    memcpy(&h, p, 2);
    return type == AE_BF16 ? ae_bf16_to_f32(h) : ae_f16_to_f32(h);
}

static void unpack_quantized(float *out, const char *part, int lane, int64_t k, int type, int64_t group,
                             int minimum) {
    const int64_t group_bytes = ae_group_bytes(type, group, minimum), step = type == AE_Q8 ? 4 : 8;
    for (int64_t begin = 0; begin < k; begin += group, part += group_bytes) {
        const int64_t n = k - begin < group ? k - begin : group;
        const float d = unpacked(part + lane * 2, AE_F16);
        const float m = minimum ? unpacked(part + 64 + lane * 2, AE_F16) : (type == AE_Q8 ? -128 : -8) * d;
        const uint8_t *q = (const uint8_t *)part + (minimum ? 128 : 64) + lane * 4;
        for (int64_t i = 0; i < n; i += step, q += AE_PANEL * 4) {
            float w[8];
            for (int j = 0; j < 4; j++) {
                w[j] = d * (float)(type == AE_Q8 ? q[j] : q[j] & 15) + m;
                w[4 + j] = d * (float)(q[j] >> 4) + m;
            }
            memcpy(out + begin + i, w, (size_t)(n - i < step ? n - i : step) * sizeof *w);
        }
    }
}

/* Value i of a lane of whole rows, in units of its scale. */
AE_INLINE int whole_value(const uint8_t *codes, int type, int lane, int64_t i) {
    codes += i / 32 * ae_whole_part_bytes(type);
    const int64_t at = i % 32;
    if (type == AE_Q4) {
        const uint8_t *steps = codes + lane * 2; /* the least code, and the step */
        const int both = codes[AE_WHOLE_STEPS + (at / 8 * AE_PANEL + lane) * 4 + at % 4];
        return steps[0] + steps[1] * (at % 8 < 4 ? both & 15 : both >> 4) - 128;
    }
    if (type == AE_Q8) return codes[(at / 4 * AE_PANEL + lane) * 4 + at % 4] - 128;
    codes += (at / 4 * 2 * AE_PANEL + lane) * 4 + at % 4;
    return AE_HIGH * (codes[0] - 128) + codes[4 * AE_PANEL] - 128;
}

static void unpack_whole(float *out, const char *panel, int lane, int64_t k, int type) {
    const float d = unpacked(panel + lane * 4, AE_F32);
    const uint8_t *codes = (const uint8_t *)panel + AE_WHOLE_SCALES;
    for (int64_t i = 0; i < k; i++) out[i] = d * (float)whole_value(codes, type, lane, i);
    rotate_row(out, out, k);
}

static void unpack_pairs(float *out, const char *panel, int lane, int64_t k) {
    for (int64_t i = 0; i < k; i++)
        out[i] = unpacked(panel + ((i / 2 * AE_PANEL + lane) * 2 + i % 2) * 2, AE_BF16);
}

static void unpack_compact(float *out, const char *start, int lane, int64_t k) {
    const ae_compact_panel *panel = (const ae_compact_panel *)start;
    const char *units = ae_compact_units(panel);
    if (panel->count < 0) {
        unpack_pairs(out, units, lane, k);
        return;
    }
    const char *plain = ae_compact_exceptions(panel);
    for (int64_t i = 0; i < k / AE_COMPACT_K * AE_COMPACT_K; i++) {
        const uint8_t *unit = (const uint8_t *)units + i / AE_COMPACT_K * AE_COMPACT_UNIT;
        const int64_t pair = i / 2 % 2, number = lane * 2 + i % 2;
        const int64_t at = number % AE_PANEL / 8 * 16 + number / AE_PANEL * 8 + number % 8;
        const int choice = unit[128 + at] >> 4 * pair & 15;
        out[i] = ae_bf16_to_f32((uint16_t)(panel->upper[choice] << 8 | unit[64 * pair + at]));
    }
    for (const int32_t *unit = panel->exception; *unit != INT32_MAX; unit++, plain += AE_COMPACT_EXCEPTION) {
        const int64_t i = (int64_t)*unit * AE_COMPACT_K;
        unpack_pairs(out + i, plain, lane, k - i < AE_COMPACT_K ? k - i : AE_COMPACT_K);
    }
}

/* out[k] = row `row` of a packed [_, k] weight. */
static void unpack_row(float *out, const char *weight, int64_t row, int64_t k, int type, int64_t group,
                       int minimum) {
    const int64_t lane = row % AE_PANEL;
    if (group == AE_COMPACT) {
        unpack_compact(out, ae_compact_at(weight, row / AE_PANEL), (int)lane, k);
        return;
    }
    const char *panel = weight + row / AE_PANEL * ae_panel_bytes(k, type, group, minimum);
    if (ae_is_whole(group)) {
        unpack_whole(out, panel, (int)lane, k, type);
    } else if (type == AE_Q8 || type == AE_Q4) {
        unpack_quantized(out, panel, (int)lane, k, type, group, minimum);
    } else if (type == AE_BF16) {
        unpack_pairs(out, panel, (int)lane, k);
    } else {
        const int64_t size = type == AE_F32 ? 4 : 2;
        for (int64_t i = 0; i < k; i++) out[i] = unpacked(panel + (i * AE_PANEL + lane) * size, type);
    }
}
