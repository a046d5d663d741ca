/* Packing of whole rows (quantized.h): rotated, then rounded to 8 or 16 bits with one scale, or to 4 bits in
 * steps that are multiples of it.
 *
 * For 4 bits, every 32 columns first get the scale and minimum of least squared error (fit.h). The row's scale is
 * the smallest with which no step is above 15 and all codes are within 8 bits. */
#pragma once
#include "fit.h"
#include "impl_quantize.h"
#include "impl_rotate.h"
#include "pack.h"

/* What codes of 8 bits may reach: less than 127, so that where they do, 15 steps of 8 fit exactly. */
#define FARTHEST 120.0f
#define MOST_STEP 15.0f

/* A row of k values into lane `lane` of its panel, of AE_WHOLE or AE_WHOLE16. `x` is overwritten, `spare` has
 * room for a quantized row. */
static void place_whole(char *panel, int lane, float *x, int64_t k, int64_t group, void *spare) {
    const int64_t width = ae_group_width(k, group), parts = ae_parts(group);
    int8_t *codes = spare;
    quantize_whole(codes, x, x, k, group);
    const float d = *ae_row8_scales(codes, k, group) / (float)ae_rotation_norm(k);
    memcpy(panel + lane * 4, &d, sizeof d);
    char *out = panel + AE_WHOLE_SCALES + lane * 4;
    for (int64_t i = 0; i < width; i += 4)
        for (int64_t part = 0; part < parts; part++, out += 4 * AE_PANEL) {
            uint32_t four;
            memcpy(&four, codes + part * width + i, sizeof four);
            four ^= 0x80808080; /* q + 128 */
            memcpy(out, &four, sizeof four);
        }
}

AE_INLINE vf limited(vf x, float low, float high) { return vf_min(vf_max(x, vf_set(low)), vf_set(high)); }

/* 32 values, in units of the row's scale, into lane `lane` of their part of a panel. */
static void place_part(char *part, int lane, const float *x, fit f) {
    float q[32];
    const float step = fminf(fmaxf(rintf(f.scale), 1), MOST_STEP);
    const float most = 127 - MOST_STEP * step; /* that least may be */
    const vf inverse = vf_set(1 / step);
    float least = fminf(fmaxf(rintf(f.minimum + 7.5f * (f.scale - step)), -128), most);
    for (int i = 0; i < 2; i++) { /* the codes of `least`, and then of what fits them best */
        vf rest = vf_zero();
        EACH(j, 32 / W) {
            const vf v = vf_load(x + j * W), code = vf_round(vf_mul(vf_sub(v, vf_set(least)), inverse));
            vf_store(q + j * W, limited(code, 0, 15));
            rest = vf_add(rest, vf_sub(v, vf_mul(vf_load(q + j * W), vf_set(step))));
        }
        if (i == 0) least = fminf(fmaxf(rintf(vf_sum(rest) / 32), -128), most);
    }
    part[lane * 2] = (char)(int)(least + 128);
    part[lane * 2 + 1] = (char)(int)step;
    char *out = part + AE_WHOLE_STEPS + lane * 4;
    for (int i = 0; i < 32; i += 8, out += 4 * AE_PANEL)
        for (int j = 0; j < 4; j++) out[j] = (char)((int)q[i + j] | (int)q[i + 4 + j] << 4);
}

/* The same in 4 bits; x has room for whole parts. */
static void place_whole_q4(char *panel, int lane, float *x, int64_t k, void *spare) {
    const int64_t parts = ae_group_width(k, AE_WHOLE) / 32;
    fit *fits = spare;
    rotate_row(x, x, k);
    for (int64_t i = k; i < 32 * parts; i++) x[i] = x[k - 1];
    float scale = 0;
    for (int64_t i = 0; i < parts; i++) {
        const range r = range_of(x + 32 * i, 32);
        if (!(r.high - r.low < INFINITY)) {
            scale = NAN;
            break;
        }
        fits[i] = fit_of(x + 32 * i, 32, r);
        scale = fmaxf(scale, fits[i].scale / MOST_STEP);
        scale = fmaxf(scale, fmaxf(-fits[i].minimum, fits[i].minimum + 15 * fits[i].scale) / FARTHEST);
    }
    if (scale < LEAST_PEAK) scale = 0;
    const float d = scale / (float)ae_rotation_norm(k);
    memcpy(panel + lane * 4, &d, sizeof d);
    char *part = panel + AE_WHOLE_SCALES;
    for (int64_t i = 0; i < parts; i++, part += ae_whole_part_bytes(AE_Q4)) {
        fit f = {0, 0};
        float v[32] = {0};
        if (scale > 0) {
            f = (fit){fits[i].scale / scale, fits[i].minimum / scale};
            for (int j = 0; j < 32; j++) v[j] = x[32 * i + j] / scale;
        }
        place_part(part, lane, v, f);
    }
}

/* The team's job; `packing` is an ae_packing. */
static void pack_whole(void *packing, const ae_thread *thread) {
    const ae_packing *p = packing;
    const ae_source *s = p->source;
    const int64_t panels = ae_target_panels(p), k = s->col_stop - s->col_start;
    float *x = thread->scratch;
    void *spare = (char *)thread->scratch + AE_SCRATCH / 2;
    for (int64_t i; (i = ae_next(thread, panels, 1)) >= 0;) {
        const ae_lanes at = ae_lanes_of(p, i);
        for (int r = 0; r < at.lanes; r++) {
            ae_source_values(x, k, s, at.row + r, 1, s->col_start, k);
            if (p->target->type == AE_Q4)
                place_whole_q4(at.panel, at.lane + r, x, k, spare);
            else
                place_whole(at.panel, at.lane + r, x, k, p->target->group, spare);
        }
    }
}

#undef FARTHEST
#undef MOST_STEP
