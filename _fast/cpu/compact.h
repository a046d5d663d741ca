/* Compact weights: bfloat16 in 12 bits and a little, bit for bit.
 *
 * The upper byte of a bf16 number is its sign and all but the last bit of its exponent. Weights of a layer are of
 * much the same size, so that sixteen upper bytes make up all but some 10^-4 of a panel. They are its table; a
 * number is stored as its lower byte and as 4 bits that choose the upper one. Four k of the 32 rows are a unit,
 * two pairs of k (pack.h), and one with a number of another upper byte is stored as it is: an exception.
 *
 * A compact weight [N, K] is
 *     int32 start[panels + 1], where each panel starts and the last one ends, in units of 64 bytes · panels
 * A panel, all parts of which are padded to 64 bytes,
 *     ae_compact_panel · exceptions [count]: bf16 [2][32][2] · units [K/4]: u8 lower[2][64] · u8 choice[64]
 * where a unit's two pairs have the lower and the upper half of a byte of `choice`. Of a pair's 64 numbers eight
 * of the first 16 rows and eight of the last take turns: where lower and upper bytes are interleaved within 16, as
 * vector instructions do, the first halves of all are the words of the first rows. Units of exceptions hold
 * anything. The last K % 4 are always an exception, and have no unit.
 *
 * Where that saves nothing, a panel has count -1, and what follows the header is all of it, as in pack.h.
 */
#pragma once
#include <stdint.h>

#include "pack.h"

#define AE_COMPACT_K 4
#define AE_COMPACT_UNIT 192
#define AE_COMPACT_EXCEPTION 256

typedef struct ae_compact_panel {
    uint8_t upper[16];
    int32_t count;       /* of exceptions */
    int32_t exception[]; /* which units they are, ascending; behind them INT32_MAX */
} ae_compact_panel;

static inline int64_t ae_compact_head_bytes(int64_t count) {
    return ((int64_t)sizeof(ae_compact_panel) + (count < 0 ? 0 : count + 1) * 4 + 63) / 64 * 64;
}

/* Bytes of a panel with so many exceptions. */
static inline int64_t ae_compact_panel_bytes(int64_t k, int64_t count) {
    if (count < 0) return ae_compact_head_bytes(count) + ae_panel_bytes(k, AE_BF16, 0, 0);
    return ae_compact_head_bytes(count) + k / AE_COMPACT_K * AE_COMPACT_UNIT + count * AE_COMPACT_EXCEPTION;
}

static inline int64_t ae_compact_index_bytes(int64_t panels) { return ((panels + 1) * 4 + 63) / 64 * 64; }

/* The most that a weight can take. */
static inline int64_t ae_compact_most_bytes(int64_t panels, int64_t k) {
    return ae_compact_index_bytes(panels) + panels * ae_compact_panel_bytes(k, -1);
}

/* Panel p; where the last one ends, for p = panels. */
static inline const char *ae_compact_at(const char *weight, int64_t p) {
    return weight + (int64_t)((const int32_t *)weight)[p] * 64;
}

static inline const char *ae_compact_exceptions(const ae_compact_panel *p) {
    return (const char *)p + ae_compact_head_bytes(p->count);
}

static inline const char *ae_compact_units(const ae_compact_panel *p) {
    return ae_compact_exceptions(p) + (p->count < 0 ? 0 : p->count * AE_COMPACT_EXCEPTION);
}

/* Appends panels [first, first + count) of `panels`, packed as bf16, to a compact weight that has those before. The
 * bytes of the weight so far, -1 in a child of fork(), -2 without memory. */
int64_t ae_compact(ae_team *team, const char *packed, int64_t k, char *weight, int64_t panels, int64_t first,
                   int64_t count);
