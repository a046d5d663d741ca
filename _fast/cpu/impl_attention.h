/* Paged causal attention: one code path for prefill, decode and mixed batches.
 *
 * A *line* is one query head of one token. The lines of a plan row that share a KV head stand in token
 * order and are cut into tiles of up to TILE_LINES (how many is a
 * matter of speed alone), so that a key or value is loaded once for all of them:
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
#include "impl_quantize.h"

#include "attention_tile.h"

#define LOG2_E 1.44269504088896341f

static int64_t first_seen(const attention *a, int64_t position) {
    return a->window && position >= a->window ? position - a->window + 1 : 0;
}

/* Lines [lo, hi) of plan row r: their queries, and what each sees. */
static void open_tile(line_tile *t, const attention *a, int64_t r, int64_t head, int64_t lo, int64_t hi) {
    const ae_step *step = a->step;
    t->keys = (span){step->block_table + (int64_t)step->row_slot[r] * step->table_stride, head, INT64_MAX, 0};
    t->row = r;
    t->first_line = lo;
    t->lines = hi - lo;
    t->partials = NULL;
    int64_t token = step->query_start[r] + lo / a->group, h = lo % a->group;
    for (int64_t i = 0; i < t->lines; i++) {
        const int64_t position = step->positions[token], first = first_seen(a, position);
        t->query[i] = a->qkv + token * a->stride + (head * a->group + h) * a->dim;
        t->first[i] = (int32_t)first;
        t->last[i] = (int32_t)position + 1;
        ae_prefetch(t->query[i], a->dim);
        t->keys.begin = first < t->keys.begin ? first : t->keys.begin;
        t->keys.end = position + 1 > t->keys.end ? position + 1 : t->keys.end;
        if (++h == a->group) token++, h = 0;
    }
}

/* One plan row as work: items are numbered tile by tile, split by split, head by head. */
typedef struct work {
    int64_t row, tokens, tile_lines, tiles, splits, first_split, cost;
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
    const int64_t first = first_seen(a, position);
    /* Large tiles load each key for many lines; small ones are more to share. */
    w->tile_lines = a->dim > MAX_DIM / 2 ? TILE_LINES / 2 : TILE_LINES;
    while (w->tile_lines > 24 && lines * a->kv_heads < 4 * a->threads * w->tile_lines && a->threads > 1)
        w->tile_lines /= 2;
    w->tiles = (lines + w->tile_lines - 1) / w->tile_lines;
    w->first_split = first / SPLIT;
    w->splits = (end - 1) / SPLIT - w->first_split + 1;
    /* Of one tile, in units of a line's work on a key; loading the key costs as much as several lines. */
    w->cost = (end - first) * ((lines < w->tile_lines ? lines : w->tile_lines) + 5);
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

/* Where the partials of a split lie, [tokens][q_heads][partial]. */
static float *partials_of(const work *w, const attention *a, int64_t split) {
    return w->partials + split * w->tokens * a->q_heads * a->partial;
}

/* The tile of a row's item `index`, narrowed to the item's split if the row is divided. */
static void open_item(line_tile *t, const attention *a, const work *w, int64_t index) {
    const int64_t parts = w->partials ? w->splits : 1, lines = w->tokens * a->group;
    const int64_t tile = w->tiles - 1 - index / a->kv_heads / parts; /* what sees most goes first */
    const int64_t lo = tile * w->tile_lines, hi = lo + w->tile_lines < lines ? lo + w->tile_lines : lines;
    open_tile(t, a, w->row, index % a->kv_heads, lo, hi);
    if (!w->partials) return;
    const int64_t split = index / a->kv_heads % parts;
    const int64_t begin = (w->first_split + split) * SPLIT, end = begin + SPLIT;
    t->partials = partials_of(w, a, split);
    t->keys.begin = begin > t->keys.begin ? begin : t->keys.begin;
    t->keys.end = end < t->keys.end ? end : t->keys.end;
}

static void whole_tile(attention_scratch *s, const attention *a, const line_tile *t, const line_tile *next) {
    const int64_t padded = a->padded;
    float *merged = s->sums[0];
    for (int64_t begin = t->keys.begin; begin < t->keys.end;) {
        const int64_t limit = (begin / SPLIT + 1) * SPLIT, end = limit < t->keys.end ? limit : t->keys.end;
        const int first = begin == t->keys.begin;
        s->acc = s->sums[!first];
        attend_split(s, a, t, begin, end, next);
        for (int64_t i = 0; i < t->lines; i++) {
            const float l = vf_sum(vf_load(s->l + i * W));
            if (first) s->merged_m[i] = s->m[i], s->merged_l[i] = l;
            else merge(merged + i * padded, &s->merged_m[i], &s->merged_l[i], s->acc + i * padded, s->m[i], l, padded);
        }
        begin = end;
    }
    for (int64_t i = 0; i < t->lines; i++) {
        const int64_t line = t->first_line + i, token = a->step->query_start[t->row] + line / a->group;
        finish(a, token, t->keys.head * a->group + line % a->group, merged + i * padded, s->merged_l[i]);
    }
}

static void one_split(attention_scratch *s, const attention *a, const line_tile *t, const line_tile *next) {
    if (t->keys.begin >= t->keys.end) return; /* beyond what this tile sees; nobody reads its partial */
    s->acc = s->sums[0];
    attend_split(s, a, t, t->keys.begin, t->keys.end, next);
    for (int64_t i = 0; i < t->lines; i++) {
        const int64_t line = t->first_line + i, h = t->keys.head * a->group + line % a->group;
        float *partial = t->partials + (line / a->group * a->q_heads + h) * a->partial;
        memcpy(partial, s->acc + i * a->padded, (size_t)a->padded * sizeof(float));
        partial[a->padded] = s->m[i];
        partial[a->padded + 1] = vf_sum(vf_load(s->l + i * W));
    }
}

/* Merges the partials of a divided row, this thread's share of its lines. */
static void combine(attention_scratch *s, const attention *a, const work *w, const ae_thread *thread) {
    const int64_t padded = a->padded;
    int64_t lo, hi;
    ae_share(thread, w->tokens * a->q_heads, 1, &lo, &hi);
    for (int64_t line = lo; line < hi; line++) {
        const int64_t i = line / a->q_heads, h = line % a->q_heads;
        const int64_t token = a->step->query_start[w->row] + i, position = a->step->positions[token];
        const int64_t first = first_seen(a, position);
        float M = 0.0f, L = 0.0f;
        for (int64_t split = first / SPLIT; split <= position / SPLIT; split++) {
            const float *partial = partials_of(w, a, split - w->first_split) + line * a->partial;
            merge(s->sums[0], &M, &L, partial, partial[padded], partial[padded + 1], padded);
        }
        finish(a, token, h, s->sums[0], L);
    }
}

static void k_attention(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    const int64_t Hq = op->n[0], Hk = op->n[1], D = op->n[2];
    const attention a = {
        .step = step, .q_heads = Hq, .kv_heads = Hk, .group = Hq / Hk, .dim = D,
        .padded = (D + W - 1) / W * W, .partial = attention_partial(D),
        .block = op->n[4], .block_stride = op->n[8], .window = op->n[6], .stride = (Hq + 2 * Hk) * D,
        .qkv = op->p[1], .keys = op->p[2], .values = op->p[3], .out = op->p[0],
        .row8 = op->p[4], .row8_group = op->n[3],
        .type = (int)op->n[5], .threads = thread->nthreads, .scale = op->f[0] * LOG2_E,
    };
    attention_scratch *s = thread->scratch;
    walk w;
    int divided = 0;
    walk_start(&w, &a, op, thread);
    while (walk_next(&w)) divided |= w.now.partials != NULL;
    const int64_t total = w.now.first_item;

    for (int64_t i = 0; i < TILE_KEYS; i++) s->data.key_scale[i] = a.scale;
    walk_start(&w, &a, op, thread);
    walk_next(&w);
    /* An item is taken while the one before is still to do, whose end fetches its first keys. */
    line_tile *now = NULL, *next = s->tiles;
    for (;;) {
        const int64_t item = ae_next(thread, total, 1);
        if (item >= 0) {
            while (item >= w.now.first_item + w.now.items) walk_next(&w);
            open_item(next, &a, &w.now, item - w.now.first_item);
        }
        const line_tile *after = item >= 0 && next->keys.begin < next->keys.end ? next : NULL;
        if (now && now->partials) one_split(s, &a, now, after);
        else if (now) whole_tile(s, &a, now, after);
        if (item < 0) break;
        now = next;
        next = now == s->tiles ? s->tiles + 1 : s->tiles;
    }
    if (!divided) return;
    ae_barrier(thread);
    walk_start(&w, &a, op, thread);
    while (walk_next(&w))
        if (w.now.partials) combine(s, &a, &w.now, thread);
}

#undef LOG2_E
