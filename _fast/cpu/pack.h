/* Packed weights: what AE_LINEAR reads.
 *
 * A weight [N, K] is cut into panels of 32 rows (output columns), each laid out so that the kernel reads
 * it from front to back once:
 *     f32, f16   [ceil(N/32)][K][32]
 *     bf16       [ceil(N/32)][ceil(K/2)][32][2]      pairs of k side by side; an odd K ends with zeros
 * (Weights in bf16 may then be made compact: compact.h.)
 * The columns past N in the last panel are never stored by the kernel; their contents do not matter.
 */
#pragma once
#include "codes.h"
#include "cpu.h"
#include "dequantize.h"
#include "kernels.h"
#include "quantized.h"
#include "team.h"

#define AE_PANEL 32

/* Bytes of the first k steps of a panel (all of it for k = K). Quantized types also need their group size, of
 * which k is a multiple or K, and whether there are minima. */
static inline int64_t ae_panel_bytes(int64_t k, int type, int64_t group, int minimum) {
    if (ae_is_whole(group)) return ae_whole_panel_bytes(k, type);
    if (type == AE_Q8 || type == AE_Q4) return ae_groups(k, group) * ae_group_bytes(type, group, minimum);
    if (type == AE_F32) return k * AE_PANEL * 4;
    return (type == AE_BF16 ? (k + 1) / 2 * 2 : k) * AE_PANEL * 2;
}

static inline int64_t ae_packed_bytes(int64_t n, int64_t k, int type, int64_t group, int minimum) {
    return (n + AE_PANEL - 1) / AE_PANEL * ae_panel_bytes(k, type, group, minimum);
}

/* Columns [col_start, col_stop) of the source's rows: rows of a checkpoint's [rows, cols] tensor. They lie in
 * `data` or, where `codes` is not NULL, are its rows from row_start on. */
typedef struct ae_source {
    const char *data;
    int type; /* enum ae_source_type */
    const ae_codes *codes;
    int64_t rows, cols, col_start, col_stop, row_start;
} ae_source;

/* Where the rows go: source row 0 becomes row `row_offset` of a packed weight with K = col_stop - col_start,
 * whose panel i lies at panel i * panel_stride + panel_offset: the halves of a gated pair take turns so. */
typedef struct ae_target {
    char *data;
    int type; /* enum ae_dtype */
    int minimum;
    int64_t group; /* of quantized types */
    int64_t row_offset, panel_stride, panel_offset;
} ae_target;

/* Packs the source on the team. -1 in a child of fork(). */
int ae_pack(ae_team *team, const ae_kernels *kernels, const ae_source *source, const ae_target *target);

/* Converts the source to rows [row_offset, ...) of a plain row-major [_, K] matrix of a plain type. */
int ae_convert(ae_team *team, const ae_source *source, const ae_target *target);

typedef struct ae_packing {
    const ae_source *source;
    const ae_target *target;
} ae_packing;

/* The lanes [lane, lane + lanes) of a panel that take the source's rows from `row` on. */
typedef struct ae_lanes {
    char *panel;
    int64_t row;
    int lane, lanes;
} ae_lanes;

/* Panels that the source has rows in, and its part of one of them. */
static inline int64_t ae_target_panels(const ae_packing *p) {
    const int64_t stop = p->target->row_offset + p->source->rows;
    return p->source->rows ? (stop + AE_PANEL - 1) / AE_PANEL - p->target->row_offset / AE_PANEL : 0;
}

static inline ae_lanes ae_lanes_of(const ae_packing *p, int64_t index) {
    const ae_target *t = p->target;
    const int64_t panel = t->row_offset / AE_PANEL + index, base = panel * AE_PANEL;
    const int64_t stop = t->row_offset + p->source->rows;
    const int64_t columns = p->source->col_stop - p->source->col_start;
    const int64_t lo = base > t->row_offset ? base : t->row_offset;
    const int64_t hi = base + AE_PANEL < stop ? base + AE_PANEL : stop;
    const int64_t bytes = ae_panel_bytes(columns, t->type, t->group, t->minimum);
    return (ae_lanes){t->data + (panel * t->panel_stride + t->panel_offset) * bytes, lo - t->row_offset,
                      (int)(lo - base), (int)(hi - lo)};
}

static inline const char *ae_source_row(const ae_source *s, int64_t row) {
    return s->data + row * ae_source_bytes(s->type, s->cols);
}

/* out[r * stride + i] = the value at row `row + r` and column `start + i`. */
static inline void ae_source_values(float *out, int64_t stride, const ae_source *s, int64_t row, int64_t rows,
                                    int64_t start, int64_t count) {
    if (s->codes) {
        ae_read_values(out, stride, s->codes, s->row_start + row, rows, start, count);
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        ae_dequantize(out + r * stride, ae_source_row(s, row + r), s->type, start, count);
}

/* The team's job of quantized types (pack_quantized.c); `packing` is an ae_packing. */
void ae_pack_quantized(void *packing, const ae_thread *thread);
