/* Packing of whole rows (quantized.h): rotated, then rounded to 8 bits with one scale. */
#pragma once
#include "impl_quantize.h"
#include "impl_rotate.h"
#include "pack.h"

/* A row of k values into lane `lane` of its panel; `x` is overwritten, `codes` is memory for a quantized row. */
static void place_whole(char *panel, int lane, float *x, int64_t k, int8_t *codes) {
    quantize_whole(codes, x, k);
    const float d = *ae_row8_scales(codes, k, AE_WHOLE) / (float)ae_rotation_norm(k);
    memcpy(panel + lane * 4, &d, sizeof d);
    char *out = panel + 4 * AE_PANEL + lane * 4;
    for (int64_t i = 0; i < ae_group_width(k, AE_WHOLE); i += 4, out += 4 * AE_PANEL) {
        uint32_t four;
        memcpy(&four, codes + i, sizeof four);
        four ^= 0x80808080; /* q + 128 */
        memcpy(out, &four, sizeof four);
    }
}

/* The team's job; `packing` is an ae_packing. */
static void pack_whole(void *packing, const ae_thread *thread) {
    const ae_packing *p = packing;
    const ae_source *s = p->source;
    const int64_t panels = ae_target_panels(p), k = s->col_stop - s->col_start;
    float *x = thread->scratch;
    int8_t *codes = (int8_t *)thread->scratch + AE_SCRATCH / 2;
    for (int64_t i; (i = ae_next(thread, panels, 1)) >= 0;) {
        const ae_lanes at = ae_lanes_of(p, i);
        for (int r = 0; r < at.lanes; r++) {
            ae_source_values(x, k, s, at.row + r, 1, s->col_start, k);
            place_whole(at.panel, at.lane + r, x, k, codes);
        }
    }
}
