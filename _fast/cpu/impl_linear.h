/* AE_LINEAR: the frame of all linear layers. A call is cut into items, each some rows times some panels of
 * 32 columns; a chunk kernel computes x @ weight.T of an item, here it gets its bias and its ending.
 *
 * A chunk kernel is
 *     void chunk(const linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels,
 *                float *out, int64_t stride, int64_t columns, const ae_thread *thread)
 * and writes out[r * stride + c] for r < rows, c < columns: the first `columns` columns of the panels. It may
 * use the first half of the thread's scratch; `linear_tile` is the second half. An output does not depend,
 * to the bit, on how a call is cut.
 */
#pragma once
#include "cpu.h"
#include "impl_elementwise.h"
#include "impl_gemm.h"
#include "linear.h"
#include "impl_quantize.h"
#include "impl_quantized.h"

/* Rows of an item of a large batch: what they read of x stays in the L2 cache. */
#define GROUP_ROWS 96
#define GROUP_PANELS 4
/* A batch of so few rows reads its weights once and is bound by it. */
#define FEW_ROWS 12

static linear linear_of(const ae_op *op, const ae_step *step) {
    linear l = {.x = op->p[1],
                .weight = op->p[2],
                .bias = op->p[3],
                .m = ae_rows_of(op, step),
                .n = op->n[0],
                .k = op->n[1],
                .type = (int)op->n[2],
                .group = op->n[4],
                .minimum = (int)op->n[5]};
    const int64_t halves = op->n[6] == AE_GATED ? 2 : 1;
    l.panels = (l.n / halves + AE_PANEL - 1) / AE_PANEL * halves;
    return l;
}

/* How a call is cut: item i is row group i / chunks, panel chunk i % chunks. */
typedef struct cut {
    int64_t group_rows, chunk_panels, chunks, items;
} cut;

/* `unit`: panels that must not be parted. An item's outputs fit `linear_tile`. */
static cut cut_linear(const linear *l, int64_t unit, int nthreads) {
    cut c;
    const int64_t units = (l->panels + unit - 1) / unit;
    int64_t chunk; /* in units */
    if (l->m <= FEW_ROWS) {
        c.group_rows = l->m;
        chunk = l->panels >= 32 * nthreads ? (8 + unit - 1) / unit : (units + nthreads - 1) / nthreads;
    } else {
        const int64_t groups = (l->m + GROUP_ROWS - 1) / GROUP_ROWS;
        c.group_rows = (l->m + groups - 1) / groups;
        chunk = unit < GROUP_PANELS ? GROUP_PANELS / unit : 1;
        while (chunk > 1 && groups * units < 4 * nthreads * chunk) chunk /= 2;
    }
    c.chunk_panels = chunk * unit;
    c.chunks = (units + chunk - 1) / chunk;
    c.items = (l->m + c.group_rows - 1) / c.group_rows * c.chunks;
    return c;
}

typedef struct item {
    int64_t row, rows, panel, panels;
} item;

/* The next item for this thread; 0 when all are taken. */
AE_INLINE int next_item(item *it, const linear *l, const cut *c, const ae_thread *thread) {
    const int64_t i = ae_next(thread, c->items, 1);
    if (i < 0) return 0;
    it->row = i / c->chunks * c->group_rows;
    it->panel = i % c->chunks * c->chunk_panels;
    it->rows = l->m - it->row < c->group_rows ? l->m - it->row : c->group_rows;
    it->panels = l->panels - it->panel < c->chunk_panels ? l->panels - it->panel : c->chunk_panels;
    return 1;
}

/* Scratch for the outputs of an item: [rows, panels * 32]. */
AE_INLINE float *linear_tile(const ae_thread *thread) {
    return (float *)((char *)thread->scratch + AE_SCRATCH / 2);
}

static void add_bias(float *out, int64_t stride, int64_t rows, int64_t columns, const float *bias) {
    for (int64_t r = 0; r < rows; r++, out += stride)
        for (int64_t c = 0; c < columns; c += W) {
            const int n = columns - c < W ? (int)(columns - c) : W;
            vf_store_n(out + c, vf_add(vf_load_n(out + c, n), vf_load_n(bias + c, n)), n);
        }
}

/* The item's x @ weight.T + bias, its first `columns` columns. */
static void linear_item(const linear *l, const item *it, float *out, int64_t stride, int64_t columns,
                        const ae_thread *thread) {
    if (ae_is_quantized(l))
        quantized_chunk(l, it->row, it->rows, it->panel, it->panels, out, stride, columns, thread);
    else
        float_chunk(l, it->row, it->rows, it->panel, it->panels, out, stride, columns, thread);
    if (l->bias) add_bias(out, stride, it->rows, columns, l->bias + it->panel * AE_PANEL);
}

static void linear_store(const ae_op *op, const linear *l, const ae_thread *thread) {
    const cut c = cut_linear(l, 1, thread->nthreads);
    for (item it; next_item(&it, l, &c, thread);) {
        const int64_t first = it.panel * AE_PANEL, width = it.panels * AE_PANEL;
        const int64_t columns = l->n - first < width ? l->n - first : width;
        linear_item(l, &it, (float *)op->p[0] + it.row * l->n + first, l->n, columns, thread);
    }
}

static void linear_add(const ae_op *op, const linear *l, const ae_thread *thread) {
    const cut c = cut_linear(l, 1, thread->nthreads);
    float *tile = linear_tile(thread);
    for (item it; next_item(&it, l, &c, thread);) {
        const int64_t first = it.panel * AE_PANEL, width = it.panels * AE_PANEL;
        const int64_t columns = l->n - first < width ? l->n - first : width;
        float *out = (float *)op->p[0] + it.row * l->n + first;
        linear_item(l, &it, tile, width, columns, thread);
        for (int64_t r = 0; r < it.rows; r++) add_bias(out + r * l->n, 0, 1, columns, tile + r * width);
    }
}

/* silu(gate) * up of one row of alternating panels, into `out`, which may be the row itself: what is
 * written lies before what is still to be read. */
AE_INLINE void gate_row(float *out, const float *y, int64_t columns) {
    for (int64_t c = 0; c < columns; c += W) {
        const float *gate = y + c / AE_PANEL * 2 * AE_PANEL + c % AE_PANEL;
        const vf v = silu_mul(vf_load(gate), vf_load(gate + AE_PANEL));
        vf_store_n(out + c, v, columns - c < W ? (int)(columns - c) : W);
    }
}

static void linear_gated(const ae_op *op, const linear *l, const ae_thread *thread) {
    const int64_t I = l->n / 2, group = op->n[3];
    /* Items cover whole groups of the quantized output. */
    const int64_t unit = op->p[4] && group > AE_PANEL ? 2 * group / AE_PANEL : 2;
    const cut c = cut_linear(l, unit, thread->nthreads);
    float *tile = linear_tile(thread);
    for (item it; next_item(&it, l, &c, thread);) {
        const int64_t first = it.panel / 2 * AE_PANEL, stride = it.panels * AE_PANEL;
        const int64_t columns = I - first < stride / 2 ? I - first : stride / 2;
        linear_item(l, &it, tile, stride, stride, thread);
        for (int64_t r = 0; r < it.rows; r++) {
            float *y = tile + r * stride;
            float *out = op->p[0] ? (float *)op->p[0] + (it.row + r) * I + first : y;
            gate_row(out, y, columns);
            if (op->p[4]) {
                int8_t *row8 = (int8_t *)op->p[4] + (it.row + r) * ae_row8_bytes(I, group);
                quantize_groups(row8, out, I, group, first, first + columns);
            }
        }
    }
}

static void k_linear(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const linear l = linear_of(op, step);
    if (op->n[6] == AE_GATED)
        linear_gated(op, &l, thread);
    else if (op->n[6] == AE_ADD)
        linear_add(op, &l, thread);
    else
        linear_store(op, &l, thread);
}

#undef GROUP_ROWS
#undef GROUP_PANELS
#undef FEW_ROWS
