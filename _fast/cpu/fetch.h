/* Weights are fetched into the cache ahead of their use.
 *
 * Most processors give a thread more from memory when it asks for lines of several pages in turn than when it
 * reads from front to back: two threads 34 GB/s against 25 on a two-core Ice Lake. So a region is fetched window
 * by window, a window in eight parts, and lines of all parts in turn; the reader follows, front to back, a
 * window behind. Zen 5 gives more in order, 48 GB/s against 40: there the eight parts are lines that follow each
 * other. Behind the end of a region comes the beginning of the one that will be read next, of a later operation.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Bytes of a window: at most an eighth of the L2 cache. */
extern int64_t ae_fetch_window;

/* Those of a window where lines are fetched in order, and 0 where they are not. */
extern int64_t ae_fetch_lead;

/* Whether it pays to fetch weights for so many rows. Where lines are fetched in order, caches do it better by
 * themselves for a single one: 5% on Zen 5. */
static inline int ae_fetch_pays(int64_t rows) { return !ae_fetch_lead || rows > 1; }

#define AE_FETCH_PARTS 8
#define AE_FETCH_LINES 128 /* bytes of each part fetched at a time: memory gives two lines together */
#define AE_FETCH_BYTES (AE_FETCH_PARTS * AE_FETCH_LINES)

typedef struct ae_region {
    const char *start;
    int64_t windows, part; /* how many, and bytes of an eighth of one */
    int64_t apart, step;   /* bytes from one line fetched to the next one, and from one turn to the next */
} ae_region;

typedef struct ae_fetch {
    ae_region region, next; /* what is fetched, and then */
    const char *at;         /* the line that is next: in the first part of the window, or in order */
    int64_t left;           /* of the window, in units of AE_FETCH_BYTES */
    int64_t windows;        /* left of the region, this one included; 0: all of it is fetched */
    int64_t due;            /* bytes that the reader may still ask for: it is not left too far behind */
} ae_fetch;

static inline ae_region ae_region_in(const char *start, int64_t bytes, int64_t window) {
    ae_region r = {.start = start, .windows = (bytes + window - 1) / window};
    const int64_t units = r.windows * AE_FETCH_BYTES;
    if (units) r.part = (bytes + units - 1) / units * AE_FETCH_LINES;
    r.apart = ae_fetch_lead ? AE_FETCH_LINES : r.part;
    r.step = ae_fetch_lead ? AE_FETCH_BYTES : AE_FETCH_LINES;
    return r;
}

/* What is read from front to back. */
static inline ae_region ae_region_of(const char *start, int64_t bytes) {
    return ae_region_in(start, bytes, ae_fetch_lead ? ae_fetch_lead : ae_fetch_window);
}

/* What is read again and again: as much as can be is fetched before. NULL: nothing. */
static inline ae_region ae_block_of(const char *start, int64_t bytes) {
    return ae_region_in(start, start ? bytes : 0, ae_fetch_window);
}

static inline void ae_fetch_region(ae_fetch *f, ae_region region) {
    f->region = region;
    f->at = region.start;
    f->left = region.part / AE_FETCH_LINES;
    f->windows = region.windows;
    f->next.windows = 0;
}

/* What AE_FETCH_BYTES of a region are: two lines each at `line`, `line + apart` and so on. */
typedef struct ae_ahead {
    const char *line;
    int64_t apart, left; /* `left`: of the AE_FETCH_PARTS */
} ae_ahead;

/* Called by the reader for every AE_FETCH_BYTES that it takes: as much is to be fetched, but no more than is due.
 * There is no call in it, around which a caller would have to save its sums. */
static inline __attribute__((always_inline)) ae_ahead ae_fetch_take(ae_fetch *f) {
    if (f->due < AE_FETCH_BYTES) return (ae_ahead){0};
    f->due -= AE_FETCH_BYTES;
    const ae_region *r = &f->region;
    const ae_ahead ahead = {f->at, r->apart, AE_FETCH_PARTS};
    f->at += r->step;
    if (--f->left > 0) return ahead;
    if (--f->windows > 0) {
        f->left = r->part / AE_FETCH_LINES;
        f->at += AE_FETCH_PARTS * r->part - f->left * r->step; /* from the end of the first part or the last */
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
    ahead->line += ahead->apart;
    ahead->left--;
}

static inline __attribute__((always_inline)) void ae_fetch_more(ae_fetch *f) {
    for (ae_ahead ahead = ae_fetch_take(f); ahead.left;) ae_fetch_part(&ahead);
}

/* For the next `bytes` that the reader takes: they are asked for `every` so many, of which `unread` are left from
 * before. In parts, or where there is too little arithmetic to put between these, all at once. */
static inline __attribute__((always_inline)) void ae_fetch_due(ae_fetch *f, ae_ahead *ahead, int64_t *unread,
                                                               int64_t bytes, int64_t every, int at_once) {
    for (*unread -= bytes; *unread < 0; *unread += every) {
        while (ahead->left) ae_fetch_part(ahead);
        if (at_once) ae_fetch_more(f);
        else *ahead = ae_fetch_take(f);
    }
}

/* The reader begins with a region of `bytes`, whose first window is fetched at once unless it is already;
 * `next`, of no bytes where it is not known, is what it will read then. */
static inline void ae_fetch_begin(ae_fetch *f, ae_region region, int64_t bytes, ae_region next) {
    if (f->region.start != region.start) {
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
