/* AE_HEAD: logits that are reduced to their best while they are in the cache. */
#pragma once
#include "impl_best.h"
#include "impl_linear.h"

/* How many of row s are kept; 0: all are stored. */
static inline int head_k(const ae_step *step, int64_t s) {
    const int32_t k = step->head_k ? step->head_k[s] : -1;
    return k < 1 ? 0 : k < AE_BEST ? k : AE_BEST;
}

static void k_head(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    linear l = linear_of(op, step);
    cut c = begin_linear(op, &l, step, thread);
    ae_best *all = op->p[4], *own = all + thread->tid * l.m;
    float *y = linear_tile(thread);
    int reduced = 0;
    for (int64_t s = 0; s < l.m; s++) {
        best_clear(&own[s]);
        reduced |= head_k(step, s);
    }
    for (item it; next_item(&it, &l, &c, thread);) {
        const int64_t first = it.panel * AE_PANEL, width = it.panels * AE_PANEL;
        const int64_t columns = l.n - first < width ? l.n - first : width;
        linear_item(&l, &it, y, width, columns, thread);
        for (int64_t r = 0; r < it.rows; r++) {
            const int64_t s = it.row + r;
            const int k = head_k(step, s);
            if (k)
                best_take(&own[s], y + r * width, columns, first, k, step->head_temperature[s]);
            else
                memcpy((float *)op->p[0] + s * l.n + first, y + r * width, (size_t)columns * sizeof *y);
        }
    }
    if (!reduced || thread->nthreads == 1) return;
    ae_barrier(thread);
    int64_t begin, end;
    ae_share(thread, l.m, 1, &begin, &end);
    for (int64_t s = begin; s < end; s++)
        for (int t = 1; t < thread->nthreads && head_k(step, s); t++)
            best_merge(&all[s], &all[t * l.m + s], head_k(step, s));
}
