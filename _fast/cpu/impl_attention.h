/* Paged causal attention: one code path for prefill, decode and mixed batches.
 *
 * A *line* is one query head of one token. The lines of a plan row that share a KV head stand in token
 * order and are cut into tiles of up to TILE_LINES, so that a key or value is loaded once for all of them:
 * for the whole GQA group in decode, for many tokens in prefill. Positions are cut at multiples of SPLIT,
 * these at multiples of TILE_KEYS. For every line and split an online softmax runs over the tiles in order
 * and gives a partial (m, l, acc): maximum, sum and weighted values; the partials of a line are merged in
 * order. Which thread does what, which lines share a tile and what else is in the batch never change a
 * line's sequence of operations, so results are the same bits for any number of threads, any batch and any
 * chunking of the prompt.
 *
 * Where there are fewer tiles than threads can share evenly, the splits of one become items of their own,
 * and leave their partials in the workspace: p7, of n7 bytes. Without room there a row is not divided;
 * the result is the same. `attention_workspace_bytes` says what is enough in practice.
 */
#pragma once
#include "attention_tile.h"

/* Lines [lo, hi) of plan row r: their queries, and what each sees. */
static void open_tile(line_tile *t, const attention *a, int64_t r, int64_t head, int64_t lo, int64_t hi) {
    t->lines = hi - lo;
    t->begin = INT64_MAX;
    t->end = 0;
    for (int64_t i = 0; i < t->lines; i++) {
        const int64_t token = a->step->query_start[r] + (lo + i) / a->group, h = (lo + i) % a->group;
        const int64_t position = a->step->positions[token];
        const int64_t first = a->window && position >= a->window ? position - a->window + 1 : 0;
        t->query[i] = a->qkv + token * a->stride + (head * a->group + h) * a->dim;
        t->first[i] = (int32_t)first;
        t->last[i] = (int32_t)position + 1;
        t->begin = first < t->begin ? first : t->begin;
        t->end = position + 1 > t->end ? position + 1 : t->end;
    }
}

/* One plan row as work: items are numbered tile by tile, split by split, head by head. */
typedef struct work {
    int64_t row, tokens, tiles, splits, first_split, cost;
    int64_t first_item, items;
    float *partials; /* [splits][tokens][q_heads][partial], or NULL: whole tiles */
} work;

static void describe(work *w, const attention *a) {
    const ae_step *step = a->step;
    const int64_t begin = step->query_start[w->row];
    w->tokens = step->query_start[w->row + 1] - begin;
    w->tiles = w->splits = w->cost = 0;
    if (w->tokens <= 0) return;
    const int64_t position = step->positions[begin], end = step->positions[begin + w->tokens - 1] + 1;
    const int64_t lines = w->tokens * a->group;
    const int64_t first = a->window && position >= a->window ? position - a->window + 1 : 0;
    w->tiles = (lines + TILE_LINES - 1) / TILE_LINES;
    w->first_split = first / SPLIT;
    w->splits = (end - 1) / SPLIT - w->first_split + 1;
    /* Of one tile, in units of a line's work on a key; loading the key costs as much as several lines. */
    w->cost = (end - first) * ((lines < TILE_LINES ? lines : TILE_LINES) + 8);
}

/* A walk over the rows that decides, the same way on every thread, which of them are divided. */
typedef struct walk {
    const attention *a;
    float *free, *end;
    int64_t total_cost, nthreads;
    work now;
} walk;

static void walk_start(walk *w, const attention *a, const ae_op *op, const ae_thread *thread) {
    *w = (walk){.a = a, .free = op->p[7], .nthreads = thread->nthreads, .now = {.row = -1}};
    w->end = w->free ? w->free + op->n[7] / (int64_t)sizeof(float) : NULL;
    for (work x = {0}; x.row < a->step->num_seqs; x.row++) {
        describe(&x, a);
        w->total_cost += x.cost * x.tiles * a->kv_heads;
    }
}

static int walk_next(walk *w) {
    const attention *a = w->a;
    work *now = &w->now;
    now->first_item += now->items;
    if (++now->row >= a->step->num_seqs) return 0;
    describe(now, a);
    now->items = now->tiles * a->kv_heads;
    now->partials = NULL;
    const int64_t size = now->splits * now->tokens * a->q_heads * a->partial;
    if (now->splits > 1 && now->cost * 2 * w->nthreads > w->total_cost && w->nthreads > 1 &&
        size <= w->end - w->free) {
        now->items *= now->splits;
        now->partials = w->free;
        w->free += size;
    }
    return 1;
}

static float *partial_of(const work *w, const attention *a, int64_t split, int64_t token, int64_t head) {
    return w->partials + ((split * w->tokens + token) * a->q_heads + head) * a->partial;
}

static void whole_tile(line_tile *t, const attention *a, const work *w, const int32_t *table, int64_t head,
                       int64_t lo) {
    const int64_t padded = a->padded;
    memset(t->merged, 0, (size_t)(t->lines * padded) * sizeof(float));
    for (int64_t i = 0; i < t->lines; i++) t->merged_m[i] = -INFINITY, t->merged_l[i] = 0.0f;
    for (int64_t begin = t->begin; begin < t->end;) {
        const int64_t next = (begin / SPLIT + 1) * SPLIT, end = next < t->end ? next : t->end;
        attend_split(t, a, table, head, begin, end);
        for (int64_t i = 0; i < t->lines; i++)
            merge(t->merged + i * padded, &t->merged_m[i], &t->merged_l[i], t->acc + i * padded, t->m[i],
                  t->l[i], padded);
        begin = next;
    }
    for (int64_t i = 0; i < t->lines; i++) {
        const int64_t token = a->step->query_start[w->row] + (lo + i) / a->group;
        const int64_t h = head * a->group + (lo + i) % a->group;
        finish(a->out + (token * a->q_heads + h) * a->dim, t->merged + i * padded, t->merged_l[i], a->dim);
    }
}

static void one_split(line_tile *t, const attention *a, const work *w, const int32_t *table, int64_t head,
                      int64_t lo, int64_t split) {
    int64_t begin = (w->first_split + split) * SPLIT, end = begin + SPLIT;
    begin = begin > t->begin ? begin : t->begin;
    end = end < t->end ? end : t->end;
    if (begin >= end) return; /* beyond what this tile sees; nobody reads its partial */
    attend_split(t, a, table, head, begin, end);
    for (int64_t i = 0; i < t->lines; i++) {
        float *partial = partial_of(w, a, split, (lo + i) / a->group, head * a->group + (lo + i) % a->group);
        memcpy(partial, t->acc + i * a->padded, (size_t)a->padded * sizeof(float));
        partial[a->padded] = t->m[i];
        partial[a->padded + 1] = t->l[i];
    }
}

/* Merges the partials of a divided row, this thread's share of its lines. */
static void combine(line_tile *t, const attention *a, const work *w, const ae_thread *thread) {
    const int64_t padded = a->padded;
    int64_t lo, hi;
    ae_share(thread, w->tokens * a->q_heads, 1, &lo, &hi);
    for (int64_t line = lo; line < hi; line++) {
        const int64_t i = line / a->q_heads, h = line % a->q_heads;
        const int64_t token = a->step->query_start[w->row] + i, position = a->step->positions[token];
        const int64_t first = a->window && position >= a->window ? position - a->window + 1 : 0;
        float M = -INFINITY, L = 0.0f;
        memset(t->merged, 0, (size_t)padded * sizeof(float));
        for (int64_t split = first / SPLIT; split <= position / SPLIT; split++) {
            const float *partial = partial_of(w, a, split - w->first_split, i, h);
            merge(t->merged, &M, &L, partial, partial[padded], partial[padded + 1], padded);
        }
        finish(a->out + (token * a->q_heads + h) * a->dim, t->merged, L, a->dim);
    }
}

static void k_attention(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t Hq = op->n[0], Hk = op->n[1], D = op->n[2];
    const attention a = {
        .step = step, .q_heads = Hq, .kv_heads = Hk, .group = Hq / Hk, .dim = D,
        .padded = (D + W - 1) / W * W, .partial = attention_partial(D),
        .block = op->n[4], .window = op->n[6], .stride = (Hq + 2 * Hk) * D,
        .qkv = op->p[1], .keys = op->p[2], .values = op->p[3], .out = op->p[0],
        .type = (int)op->n[5], .scale = op->f[0],
    };
    line_tile *t = thread->scratch;
    walk w;
    int divided = 0;
    walk_start(&w, &a, op, thread);
    while (walk_next(&w)) divided |= w.now.partials != NULL;
    const int64_t total = w.now.first_item;

    walk_start(&w, &a, op, thread);
    walk_next(&w);
    for (int64_t item; (item = ae_next(thread, total, 1)) >= 0;) {
        while (item >= w.now.first_item + w.now.items) walk_next(&w);
        const int64_t parts = w.now.partials ? w.now.splits : 1, index = item - w.now.first_item;
        const int64_t head = index % Hk, split = index / Hk % parts, lo = index / Hk / parts * TILE_LINES;
        const int64_t lines = w.now.tokens * a.group;
        const int64_t hi = lo + TILE_LINES < lines ? lo + TILE_LINES : lines;
        const int32_t *table = step->block_table + (int64_t)step->row_slot[w.now.row] * step->table_stride;
        open_tile(t, &a, w.now.row, head, lo, hi);
        if (w.now.partials) one_split(t, &a, &w.now, table, head, lo, split);
        else whole_tile(t, &a, &w.now, table, head, lo);
    }
    if (!divided) return;
    ae_barrier(thread);
    walk_start(&w, &a, op, thread);
    while (walk_next(&w))
        if (w.now.partials) combine(t, &a, &w.now, thread);
}
