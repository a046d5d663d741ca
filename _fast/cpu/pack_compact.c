/* Packing of compact weights (compact.h): panels become units, and then, when it is known how many exceptions each
 * has, go to their places. */
#include "compact.h"

#include <stdlib.h>
#include <string.h>

#define PAIR (2 * AE_PANEL) /* numbers of a pair of k */
#define UNIT (AE_COMPACT_K * AE_PANEL)
#define NOWHERE 16

/* A panel on its way. */
typedef struct draft {
    uint8_t upper[16];
    uint8_t choice[256]; /* of an upper byte, or NOWHERE */
    int32_t count;       /* of exceptions; -1: nothing is saved */
    int32_t *exception;
    uint8_t *units;
} draft;

typedef struct compaction {
    const char *packed;
    int64_t k;
    char *weight;
    int64_t first, count;
    draft *drafts;
} compaction;

/* The most exceptions with which a panel is smaller than the plain one, or more. */
static int64_t most_exceptions(int64_t k) {
    return k / AE_COMPACT_K * (AE_COMPACT_EXCEPTION - AE_COMPACT_UNIT) / AE_COMPACT_EXCEPTION + 1;
}

static const uint16_t *plain_of(const compaction *c, int64_t i) {
    return (const uint16_t *)(c->packed + i * ae_panel_bytes(c->k, AE_BF16, 0, 0));
}

static void choose_table(draft *d, const uint16_t *x, int64_t k) {
    uint32_t turns[4][256] = {0}; /* else a count would wait for the one before, often of the same byte */
    for (int64_t i = 0; i < (k + 1) / 2 * PAIR; i += 4)
        for (int j = 0; j < 4; j++) turns[j][x[i + j] >> 8]++;
    for (int b = 0; b < 256; b++) turns[0][b] += turns[1][b] + turns[2][b] + turns[3][b];
    memset(d->choice, NOWHERE, sizeof d->choice);
    for (int i = 0; i < 16; i++) {
        int most = 0;
        for (int b = 1; b < 256; b++)
            if (turns[0][b] > turns[0][most]) most = b;
        d->upper[i] = (uint8_t)most;
        d->choice[most] = (uint8_t)i;
        turns[0][most] = 0;
    }
}

/* Whether the unit is no exception. */
static int write_unit(uint8_t *to, const uint16_t *unit, const uint8_t *choice_of) {
    uint16_t turns[UNIT]; /* eight of the first half of a pair, eight of the second */
    for (int i = 0; i < UNIT; i += PAIR)
        for (int at = 0; at < AE_PANEL; at += 8) {
            memcpy(turns + i + 2 * at, unit + i + at, 16);
            memcpy(turns + i + 2 * at + 8, unit + i + AE_PANEL + at, 16);
        }
    int missing = 0;
    for (int j = 0; j < UNIT; j++) to[j] = (uint8_t)turns[j];
    for (int j = 0; j < PAIR; j++) {
        const int low = choice_of[turns[j] >> 8], high = choice_of[turns[PAIR + j] >> 8];
        missing |= low | high;
        to[UNIT + j] = (uint8_t)(low | high << 4);
    }
    return !(missing & NOWHERE);
}

static void write_units(draft *d, const uint16_t *x, int64_t k) {
    const int64_t most = most_exceptions(k);
    d->count = 0;
    for (int64_t u = 0; u < k / AE_COMPACT_K && d->count < most; u++)
        if (!write_unit(d->units + u * AE_COMPACT_UNIT, x + u * UNIT, d->choice))
            d->exception[d->count++] = (int32_t)u;
    if (k % AE_COMPACT_K) d->exception[d->count++] = (int32_t)(k / AE_COMPACT_K);
    if (ae_compact_panel_bytes(k, d->count) >= ae_compact_panel_bytes(k, -1)) d->count = -1;
}

static void draft_all(void *compaction_, const ae_thread *thread) {
    const compaction *c = compaction_;
    for (int64_t i; (i = ae_next(thread, c->count, 1)) >= 0;) {
        choose_table(&c->drafts[i], plain_of(c, i), c->k);
        write_units(&c->drafts[i], plain_of(c, i), c->k);
    }
}

static void place(char *to, const draft *d, const uint16_t *x, int64_t k) {
    ae_compact_panel *panel = (ae_compact_panel *)to;
    memset(to, 0, (size_t)ae_compact_head_bytes(d->count));
    memcpy(panel->upper, d->upper, sizeof d->upper);
    panel->count = d->count;
    if (d->count < 0) {
        memcpy(to + ae_compact_head_bytes(-1), x, (size_t)ae_panel_bytes(k, AE_BF16, 0, 0));
        return;
    }
    char *plain = (char *)ae_compact_exceptions(panel);
    for (int32_t i = 0; i < d->count; i++, plain += AE_COMPACT_EXCEPTION) {
        const int64_t first = (int64_t)d->exception[i] * AE_COMPACT_K;
        const int64_t n = k - first < AE_COMPACT_K ? k - first : AE_COMPACT_K;
        panel->exception[i] = d->exception[i];
        memset(plain, 0, AE_COMPACT_EXCEPTION);
        memcpy(plain, x + first * AE_PANEL, (size_t)ae_panel_bytes(n, AE_BF16, 0, 0));
    }
    panel->exception[d->count] = INT32_MAX;
    memcpy(plain, d->units, (size_t)(k / AE_COMPACT_K * AE_COMPACT_UNIT));
}

static void place_all(void *compaction_, const ae_thread *thread) {
    const compaction *c = compaction_;
    for (int64_t i; (i = ae_next(thread, c->count, 1)) >= 0;)
        place((char *)ae_compact_at(c->weight, c->first + i), &c->drafts[i], plain_of(c, i), c->k);
}

int64_t ae_compact(ae_team *team, const char *packed, int64_t k, char *weight, int64_t panels, int64_t first,
                   int64_t count) {
    const int64_t exceptions = most_exceptions(k) + 1, units = k / AE_COMPACT_K * AE_COMPACT_UNIT;
    char *memory = malloc((size_t)(count * ((int64_t)sizeof(draft) + exceptions * 4 + units)) + 1);
    if (!memory) return -2;
    compaction c = {packed, k, weight, first, count, (draft *)memory};
    int32_t *exception = (int32_t *)(c.drafts + count);
    for (int64_t i = 0; i < count; i++) {
        c.drafts[i].exception = exception + i * exceptions;
        c.drafts[i].units = (uint8_t *)(exception + count * exceptions) + i * units;
    }
    int32_t *start = (int32_t *)weight;
    if (first == 0) start[0] = (int32_t)(ae_compact_index_bytes(panels) / 64);
    int failed = ae_team_run(team, draft_all, &c);
    for (int64_t i = 0; i < count && !failed; i++)
        start[first + i + 1] = start[first + i] + (int32_t)(ae_compact_panel_bytes(k, c.drafts[i].count) / 64);
    if (!failed) failed = ae_team_run(team, place_all, &c);
    free(memory);
    return failed ? failed : (int64_t)start[first + count] * 64;
}
