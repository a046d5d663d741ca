/* AE_LINEAR: the frame of all linear layers. A call is cut into items, each some rows times some panels of
 * 32 columns; a chunk kernel computes x @ weight.T of an item, here it gets its bias and its ending.
 *
 * A chunk kernel (chunk_fn) writes out[r * stride + c] for r < rows, c < columns: the first `columns` columns
 * of the panels. It may use the first half of the thread's scratch, where it finds what the item before left;
 * `linear_tile` is the second half. An output does not depend, to the bit, on how a call is cut.
 */
#pragma once
#include "cpu.h"
#if defined(AE_LEVEL_AMX)
#include "impl_amx.h"
#include "impl_amx_whole.h"
#endif
#include "impl_elementwise.h"
#include "impl_gemm.h"
#include "linear.h"
#include "impl_quantize.h"
#include "impl_quantized.h"
#include "impl_whole.h"
#include "impl_whole16.h"

typedef void (*chunk_fn)(linear *l, int64_t row, int64_t rows, int64_t panel, int64_t panels, float *out,
                         int64_t stride, int64_t columns, const ae_thread *thread);

/* Panels of an item of a large batch. */
#define GROUP_PANELS 8
/* Outputs of an item of a small batch: they stay in the L1 cache until they are finished. */
#define TILE_FLOATS 8192
/* Items of a thread's share of a small batch: others can help with so many. Of fewer rows it is one if it fits, and
 * nobody helps: their time is that of memory, and weights are fetched for their thread. */
#define SHARE_CHUNKS 6
#define HELPED_ROWS 16

static linear linear_of(const ae_op *op, const ae_step *step) {
    linear l = {.x = op->p[1],
                .weight = op->p[2],
                .bias = op->p[3],
                .m = ae_rows_of(op, step),
                .n = op->n[0],
                .k = op->n[1],
                .type = (int)op->n[2],
                .group = op->n[4] == AE_COMPACT ? 0 : op->n[4],
                .compact = op->n[4] == AE_COMPACT,
                .rounded = (int)op->n[7],
                .minimum = (int)op->n[5],
                .converted = -1};
    const int64_t halves = op->n[6] == AE_GATED ? 2 : 1;
    l.panels = (l.n / halves + AE_PANEL - 1) / AE_PANEL * halves;
    return l;
}

/* How a call is cut. The panels of a small batch (linear.h) are shared out evenly: so a thread knows which
 * ones it will read, and can fetch them in time. Of a large batch item i is row group i / chunks, panel chunk
 * i % chunks: a thread's share are the rows that it has, or nearly so, in other operations, which may lie in a
 * cache of its own. Who is done with his share helps others. */
typedef struct cut {
    int64_t units, unit; /* panels of a small batch come in so many units of so many panels */
    int done;            /* shares of which all is taken: of this thread, of the next one, ... */
    int64_t taken;       /* of this thread's share, where nobody helps */
    int64_t group_rows, chunk_panels, chunks, items;
} cut;

/* Panels of a thread's share of a small batch. */
typedef struct share {
    int64_t panel, stop;
} share;

static share share_of(const linear *l, const cut *c, int owner, const ae_thread *thread) {
    const share s = {c->units * owner / thread->nthreads * c->unit,
                     c->units * (owner + 1) / thread->nthreads * c->unit};
    return s.stop > l->panels ? (share){s.panel, l->panels} : s;
}

static int is_helped(const linear *l) { return l->m >= HELPED_ROWS; }

/* `unit`: panels that must not be parted. An item's outputs fit `linear_tile`. */
static cut cut_linear(const linear *l, int64_t unit, const ae_thread *thread) {
    const int64_t units = (l->panels + unit - 1) / unit;
    cut c = {.group_rows = l->m, .units = units, .unit = unit};
    int64_t chunk; /* in units */
    if (is_small(l)) {
        const int64_t most = TILE_FLOATS / (AE_PANEL * unit * l->m);
        const int64_t items = (is_helped(l) ? SHARE_CHUNKS : 1) * thread->nthreads;
        chunk = (units + items - 1) / items;
        if (chunk > most) chunk = most;
        if (chunk < 1) chunk = 1;
    } else {
        const int64_t groups = (l->m + GROUP_ROWS - 1) / GROUP_ROWS;
        c.group_rows = (l->m + groups - 1) / groups;
        chunk = unit < GROUP_PANELS ? GROUP_PANELS / unit : 1;
        while (chunk > 1 && groups * units < 4 * thread->nthreads * chunk) chunk /= 2;
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
AE_INLINE int next_item(item *it, const linear *l, cut *c, const ae_thread *thread) {
    for (; c->done < thread->nthreads; c->done++) {
        const int owner = (thread->tid + c->done) % thread->nthreads;
        int64_t stop = l->panels;
        if (is_small(l)) {
            const share s = share_of(l, c, owner, thread);
            const int64_t items = (s.stop - s.panel + c->chunk_panels - 1) / c->chunk_panels;
            int64_t i = -1;
            if (is_helped(l)) i = ae_take(thread, owner, items);
            else if (owner == thread->tid && c->taken < items) i = c->taken++;
            if (i < 0) continue;
            *it = (item){.rows = l->m, .panel = s.panel + i * c->chunk_panels};
            stop = s.stop;
        } else {
            const int64_t first = c->items * owner / thread->nthreads;
            const int64_t taken = ae_take(thread, owner, c->items * (owner + 1) / thread->nthreads - first);
            if (taken < 0) continue;
            const int64_t i = first + taken;
            it->row = i / c->chunks * c->group_rows;
            it->panel = i % c->chunks * c->chunk_panels;
            it->rows = l->m - it->row < c->group_rows ? l->m - it->row : c->group_rows;
        }
        it->panels = stop - it->panel < c->chunk_panels ? stop - it->panel : c->chunk_panels;
        return 1;
    }
    return 0;
}

/* Panels of the output that must not be parted: whole groups of a gated output's quantized rows. */
static int64_t unit_of(const ae_op *op) {
    if (op->code != AE_LINEAR || op->n[6] != AE_GATED) return 1;
    return op->p[4] && op->n[3] > AE_PANEL ? 2 * op->n[3] / AE_PANEL : 2;
}

/* This thread's panels of a small batch: what is fetched. */
static int64_t share_bytes(const linear *l, share s) { return panel_at(l, s.stop) - panel_at(l, s.panel); }

static ae_region share_region(const linear *l, share s) {
    return ae_region_of(panel_at(l, s.panel), share_bytes(l, s));
}

/* Cuts the call, has its weights and those of the next one fetched, and its rows prepared. */
static cut begin_linear(const ae_op *op, linear *l, const ae_step *step, const ae_thread *thread) {
    const cut c = cut_linear(l, unit_of(op), thread);
    if (!is_small(l)) return c;
    const share s = share_of(l, &c, thread->tid, thread);
    if (s.panel < s.stop && ae_fetch_pays(l->m)) {
        ae_region next = {0};
        if (thread->upcoming) {
            const linear after = linear_of(thread->upcoming, step);
            const cut cut_after = cut_linear(&after, unit_of(thread->upcoming), thread);
            if (is_small(&after))
                next = share_region(&after, share_of(&after, &cut_after, thread->tid, thread));
        }
        ae_fetch_begin(thread->fetch, share_region(l, s), share_bytes(l, s), next);
    }
    if (l->group > 0) prepare_quantized(l, thread);
    return c;
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
static void linear_item(linear *l, const item *it, float *out, int64_t stride, int64_t columns,
                        const ae_thread *thread) {
    chunk_fn chunk = l->group == AE_WHOLE     ? whole_chunk
                     : l->group == AE_WHOLE16 ? whole16_chunk
                     : l->group               ? quantized_chunk
                                              : float_chunk;
#if defined(AE_LEVEL_AMX)
    if (l->type == AE_BF16 && !l->compact) chunk = tiled_chunk;
    if (l->group == AE_WHOLE && it->rows > VNNI_ROWS && (l->type == AE_Q8 || can_spread(l, 1)))
        chunk = tiled_whole_chunk;
#endif
    chunk(l, it->row, it->rows, it->panel, it->panels, out, stride, columns, thread);
    if (l->bias) add_bias(out, stride, it->rows, columns, l->bias + it->panel * AE_PANEL);
}

static void linear_store(const ae_op *op, linear *l, cut c, const ae_thread *thread) {
    for (item it; next_item(&it, l, &c, thread);) {
        const int64_t first = it.panel * AE_PANEL, width = it.panels * AE_PANEL;
        const int64_t columns = l->n - first < width ? l->n - first : width;
        linear_item(l, &it, (float *)op->p[0] + it.row * l->n + first, l->n, columns, thread);
    }
}

static void linear_add(const ae_op *op, linear *l, cut c, const ae_thread *thread) {
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

static void linear_gated(const ae_op *op, linear *l, cut c, const ae_thread *thread) {
    const int64_t I = l->n / 2, group = op->n[3];
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
    linear l = linear_of(op, step);
    const cut c = begin_linear(op, &l, step, thread);
    if (op->n[6] == AE_GATED)
        linear_gated(op, &l, c, thread);
    else if (op->n[6] == AE_ADD)
        linear_add(op, &l, c, thread);
    else
        linear_store(op, &l, c, thread);
}

#undef GROUP_PANELS
#undef TILE_FLOATS
#undef SHARE_CHUNKS
#undef HELPED_ROWS
