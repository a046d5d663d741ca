/* Weights are fetched into the cache ahead of their use.
 *
 * A thread gets more from memory when it asks for lines of several pages in turn than when it reads from
 * front to back: two threads 34 GB/s against 25 on a two-core Ice Lake. So a region is fetched window by
 * window, a window in eight parts, and lines of all parts in turn; the reader follows, front to back, a
 * window behind. Behind the end of a region comes the beginning of the one that will be read next, of a later
 * operation.
 *
 * Not so on Zen 5 where there is little to compute: what its caches fetch by themselves then gets more from
 * memory, 39 GB/s against 33.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Bytes of a window: at most an eighth of the L2 cache. */
extern int64_t ae_fetch_window;

/* Rows of the smallest batch for which weights are fetched. */
extern int64_t ae_fetch_rows;

#define AE_FETCH_PARTS 8
#define AE_FETCH_LINES 128 /* bytes of each part fetched at a time: memory gives two lines together */
#define AE_FETCH_BYTES (AE_FETCH_PARTS * AE_FETCH_LINES)

typedef struct ae_region {
    const char *start;
    int64_t windows, part; /* how many, and bytes of an eighth of one */
} ae_region;

typedef struct ae_fetch {
    ae_region region, next; /* what is fetched, and then */
    const char *at;         /* in the first part of the window */
    int64_t left;           /* of the window, in units of AE_FETCH_BYTES */
    int64_t windows;        /* left of the region, this one included; 0: all of it is fetched */
    int64_t due;            /* bytes that the reader may still ask for: it is not left too far behind */
} ae_fetch;

static inline ae_region ae_region_of(const char *start, int64_t bytes) {
    ae_region r = {.start = start, .windows = (bytes + ae_fetch_window - 1) / ae_fetch_window};
    const int64_t units = r.windows * AE_FETCH_BYTES;
    if (units) r.part = (bytes + units - 1) / units * AE_FETCH_LINES;
    return r;
}

static inline void ae_fetch_region(ae_fetch *f, ae_region region) {
    f->region = region;
    f->at = region.start;
    f->left = region.part / AE_FETCH_LINES;
    f->windows = region.windows;
    f->next.windows = 0;
}

/* What AE_FETCH_BYTES of a region are: two lines each at `line`, `line + part` and so on. */
typedef struct ae_ahead {
    const char *line;
    int64_t part, left; /* `left`: of the parts */
} ae_ahead;

/* Called by the reader for every AE_FETCH_BYTES that it takes: as much is to be fetched, but no more than is due.
 * There is no call in it, around which a caller would have to save its sums. */
static inline __attribute__((always_inline)) ae_ahead ae_fetch_take(ae_fetch *f) {
    if (f->due < AE_FETCH_BYTES) return (ae_ahead){0};
    f->due -= AE_FETCH_BYTES;
    const ae_ahead ahead = {f->at, f->region.part, AE_FETCH_PARTS};
    f->at += AE_FETCH_LINES;
    if (--f->left > 0) return ahead;
    if (--f->windows > 0) {
        f->at += (AE_FETCH_PARTS - 1) * f->region.part; /* it is at the end of the first part */
        f->left = f->region.part / AE_FETCH_LINES;
    } else {
        ae_fetch_region(f, f->next);
        if (f->windows == 0) f->due = 0;
    }
    return ahead;
}

/* A part of what was taken. Where there is arithmetic between them, parts are fetched one by one: many at once
 * would wait for each other, and what follows for them. */
static inline __attribute__((always_inline)) void ae_fetch_part(ae_ahead *ahead) {
    if (ahead->left == 0) return;
    __builtin_prefetch(ahead->line);
    __builtin_prefetch(ahead->line + 64);
    ahead->line += ahead->part;
    ahead->left--;
}

static inline __attribute__((always_inline)) void ae_fetch_more(ae_fetch *f) {
    ae_ahead ahead = ae_fetch_take(f);
    while (ahead.left) ae_fetch_part(&ahead);
}

/* The reader begins with a region of `bytes`, whose first window is fetched at once unless it is already;
 * `next`, of no bytes where it is not known, is what it will read then. */
static inline void ae_fetch_begin(ae_fetch *f, const char *start, int64_t bytes, ae_region next) {
    const ae_region region = ae_region_of(start, bytes);
    if (f->region.start != start) {
        ae_fetch_region(f, region);
        for (f->due = f->left * AE_FETCH_BYTES; f->due > 0;) ae_fetch_more(f);
        f->region = region; /* small ones are done with already */
    }
    f->next = next;
    if (f->windows == 0) ae_fetch_region(f, next);
    /* Windows are whole, regions are not. */
    f->due = region.windows * region.part * AE_FETCH_PARTS - bytes;
}

/* The reader begins with so many bytes of a region. */
static inline void ae_fetch_allow(ae_fetch *f, int64_t bytes) {
    f->due = f->windows ? f->due + bytes : 0;
}
