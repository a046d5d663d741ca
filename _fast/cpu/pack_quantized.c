/* Packing of quantized weights (quantized.h). The scales of a source that is coded in groups are kept and its
 * codes come back exactly (the minimum that zero points make is rounded); other weights get scales of their
 * own:
 *     8 bits    d = max|w| / 127, symmetric
 *     4 bits    the d (and m) of least squared error, over several ranges from which outliers fall out, each
 *               with its codes' least-squares fit
 * A group that holds a NaN or an infinity has a NaN as its scale.
 */
#include "fit.h"
#include "half.h"
#include "pack.h"
#include "simd.h"

#define CHUNK 256
#define MAX_GROUP 128
/* Panels packed at a time: where the stored rows lie side by side, so many share a cache line. */
#define PANELS 4
#define NOT_FINITE 0x7E00

typedef struct coded {
    uint8_t q[MAX_GROUP];
    uint16_t d, m;
} coded;

/* Codes (x - minimum) / scale, rounded and limited to [0, most]. */
static void encode(coded *c, const float *x, int64_t n, float scale, float minimum, int most) {
    const vf inverse = vf_set(scale != 0 ? 1 / scale : 0);
    const vf first = vf_set(minimum), last = vf_set((float)most);
    for (int64_t i = 0; i < n; i += W) {
        vf q = vf_round(vf_mul(vf_sub(vf_load(x + i), first), inverse));
        q = vf_min(vf_max(q, vf_zero()), last); /* in this order a NaN becomes 0 */
        for (int j = 0; j < W; j++) c->q[i + j] = (uint8_t)q[j];
    }
}

/* The scale and minimum are rounded to half precision, and the codes fitted to what remains of them. */
static void finish(coded *c, const float *x, int64_t n, float scale, float minimum, int most) {
    c->d = ae_f32_to_f16(scale);
    c->m = ae_f32_to_f16(minimum);
    encode(c, x, n, ae_f16_to_f32(c->d), ae_f16_to_f32(c->m), most);
}

/* Without a minimum of its own a group's lowest code stands for -zero * scale. */
static void finish_symmetric(coded *c, const float *x, int64_t n, float scale, int zero) {
    const float d = ae_f16_to_f32(ae_f32_to_f16(scale));
    finish(c, x, n, d, -(float)zero * d, 2 * zero - 1);
}

static void search_symmetric(coded *c, const float *x, int64_t n, range r) {
    /* Codes reach one further down than up: the peak takes the lower end. */
    float best = -1, scale = r.peak / -8;
    for (int i = 0; i < RANGES; i++) {
        const moments s = moments_of(x, n, r.peak / -8 * (1.07f - SHRINK * (float)i), 0, -8);
        const float explained = s.ll > 0 ? s.xl * s.xl / s.ll : 0;
        if (explained > best) best = explained, scale = s.xl / s.ll;
    }
    finish_symmetric(c, x, n, scale, 8);
}

/* n whole vectors of x with scales of their own. */
static void quantize(coded *c, const float *x, int64_t n, const ae_target *t) {
    const range r = range_of(x, n);
    if (!(r.high - r.low < INFINITY)) {
        memset(c, 0, sizeof *c);
        c->d = NOT_FINITE;
    } else if (r.low == r.high && t->minimum) {
        finish(c, x, n, 0, r.low, 0);
    } else if (r.peak == 0) {
        finish_symmetric(c, x, n, 0, t->type == AE_Q8 ? 128 : 8);
    } else if (t->type == AE_Q8) {
        finish_symmetric(c, x, n, fabsf(r.peak) / 127, 128);
    } else if (t->minimum) {
        const fit best = fit_of(x, n, r);
        finish(c, x, n, best.scale, best.minimum, 15);
    } else {
        search_symmetric(c, x, n, r);
    }
}

/* Whether groups of the target can take scales and codes as the source has them. */
static int keeps_codes(const ae_source *s, const ae_target *t) {
    const int bits = t->type == AE_Q8 ? 8 : 4;
    if (s->codes) {
        const ae_codes *c = s->codes;
        const int fits = t->minimum || c->zero.words == NULL || c->bits < bits;
        const int whole = c->group >= s->cols || (c->group % t->group == 0 && s->col_start % t->group == 0);
        return c->bits <= bits && fits && whole && c->group_of == NULL;
    }
    const ae_coding coding = ae_source_coding(s->type);
    return coding.bits && coding.bits <= bits && (t->minimum || coding.zero >= 0) && t->group == 32 &&
           s->col_start % 32 == 0;
}

/* A group of a GGUF row, x its values. */
static void keep_block(coded *c, const float *x, int64_t n, const ae_target *t, const ae_source *s,
                       const void *row, int64_t start) {
    const int bits = t->type == AE_Q8 ? 8 : 4;
    float scale, minimum;
    ae_source_scale(&scale, &minimum, row, s->type, start);
    if (ae_source_coding(s->type).zero >= 0) minimum = -(float)(1 << (bits - 1)) * scale;
    c->d = ae_f32_to_f16(scale);
    c->m = ae_f32_to_f16(minimum);
    encode(c, x, n, scale, minimum, (1 << bits) - 1);
}

/* A group of codes. A minimum is the product of scale and zero point, rounded: within 2^-11 of it, which is
 * 0.004 steps of a code at a zero point of 8. */
static void keep_codes(coded *c, const uint8_t *q, int64_t n, const ae_target *t, const ae_source *s,
                       int64_t row, int64_t start) {
    float scale;
    int zero;
    ae_read_scale(&scale, &zero, s->codes, s->row_start + row, start / s->codes->group);
    const int shift = t->minimum ? 0 : (t->type == AE_Q8 ? 128 : 8) - zero;
    c->d = ae_f32_to_f16(scale);
    c->m = ae_f32_to_f16(-(float)zero * scale);
    memset(c->q, 0, sizeof c->q);
    for (int64_t i = 0; i < n; i++) c->q[i] = (uint8_t)(q[i] + shift);
}

/* A group's codes into lane `lane` of its part of the panel. */
static void place(char *part, const coded *c, const ae_target *t, int lane) {
    memcpy(part + lane * 2, &c->d, 2);
    if (t->minimum) memcpy(part + 64 + lane * 2, &c->m, 2);
    char *out = part + (t->minimum ? 128 : 64) + lane * 4;
    for (int64_t k = 0; k < t->group; out += AE_PANEL * 4) {
        uint32_t low, high;
        memcpy(&low, c->q + k, 4);
        k += 4;
        if (t->type == AE_Q4) {
            memcpy(&high, c->q + k, 4);
            low |= high << 4;
            k += 4;
        }
        memcpy(out, &low, 4);
    }
}

/* Columns [start, start + count) of one lane. */
static void pack_values(char *part, const ae_packing *p, int lane, int64_t row, int64_t start, int64_t count,
                        int kept) {
    const ae_source *s = p->source;
    const ae_target *t = p->target;
    float wide[CHUNK + W];
    coded c;
    memset(&c, 0, sizeof c);
    ae_source_values(wide, CHUNK, s, row, 1, start, count);
    for (int j = 0; j < W; j++) wide[count + j] = wide[count - 1];
    for (int64_t k = 0; k < count; k += t->group) {
        const int64_t n = count - k < t->group ? (count - k + W - 1) / W * W : t->group;
        if (kept)
            keep_block(&c, wide + k, n, t, s, ae_source_row(s, row), start + k);
        else
            quantize(&c, wide + k, n, t);
        place(part + k / t->group * ae_group_bytes(t->type, t->group, t->minimum), &c, t, lane);
    }
}

/* The same of all lanes, whose codes stay. */
static void pack_codes(char *part, const ae_packing *p, const ae_lanes *at, int64_t start, int64_t count) {
    const ae_source *s = p->source;
    const ae_target *t = p->target;
    uint8_t q[AE_PANEL * CHUNK];
    coded c;
    ae_read_codes(q, CHUNK, s->codes, s->row_start + at->row, at->lanes, start, count);
    for (int64_t k = 0; k < count; k += t->group, part += ae_group_bytes(t->type, t->group, t->minimum)) {
        const int64_t n = count - k < t->group ? count - k : t->group;
        for (int r = 0; r < at->lanes; r++) {
            keep_codes(&c, q + r * CHUNK + k, n, t, s, at->row + r, start + k);
            place(part, &c, t, at->lane + r);
        }
    }
}

void ae_pack_quantized(void *packing, const ae_thread *thread) {
    const ae_packing *p = packing;
    const ae_source *s = p->source;
    const ae_target *t = p->target;
    const int64_t group_bytes = ae_group_bytes(t->type, t->group, t->minimum), panels = ae_target_panels(p);
    const int kept = keeps_codes(s, t);
    for (int64_t i; (i = ae_next(thread, panels, PANELS)) >= 0;) {
        const int64_t end = panels - i < PANELS ? panels : i + PANELS;
        for (int64_t start = s->col_start; start < s->col_stop; start += CHUNK) {
            const int64_t count = s->col_stop - start < CHUNK ? s->col_stop - start : CHUNK;
            for (int64_t panel = i; panel < end; panel++) {
                const ae_lanes at = ae_lanes_of(p, panel);
                char *part = at.panel + (start - s->col_start) / t->group * group_bytes;
                if (kept && s->codes)
                    pack_codes(part, p, &at, start, count);
                else
                    for (int r = 0; r < at.lanes; r++)
                        pack_values(part, p, at.lane + r, at.row + r, start, count, kept);
            }
        }
    }
}
