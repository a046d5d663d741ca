/* What the tiles of linear layers share: some rows of x times a panel, their sums in registers. */
#pragma once
#include "pack.h"
#include "simd.h"

#define PANEL_VECTORS (AE_PANEL / W)

/* Vectors of weights, of so many, that are in registers at once besides the sums: one, or all, and then
 * EACH_HELD is no loop. */
#if defined(AE_LEVEL_NEON) || defined(AE_LEVEL_AVX2)
#define HELD(vectors) 1
#define EACH_HELD(first, vectors) EACH(first, vectors)
#else
#define HELD(vectors) (vectors)
#define EACH_HELD(first, vectors) enum { first };
#endif

/* Row m of x, of at most 12: three rows share one of the addresses of `base`, so that all fit the registers. */
#define ROW_BASES(x, stride) {(x), (x) + 3 * (stride), (x) + 6 * (stride), (x) + 9 * (stride)}
#define ROW(base, m, stride) (base[(m) / 3] + (m) % 3 * (stride))
/* Four codes of it, from code k on, as simd_int.h multiplies them. */
#define ROW_CODES(base, m, stride, k) signed4_set(*(const int32_t *)(ROW(base, m, stride) + (k)))
#define NEXT_ROWS(base, rows, bytes) EACH(i, ((rows) + 2) / 3) base[i] += (bytes)

/* Four codes of each of a panel's outputs, as whole rows have them: their bytes, and where vector v starts. */
#define LINE_BYTES (4 * AE_PANEL)
#define IN_LINE(v) ((v) % PANEL_VECTORS * W * 4)

/* F(1) F(2) ... F(rows). */
#define UP_TO(rows, F) UP_TO_(rows, F)
#define UP_TO_(rows, F) UP_TO_##rows(F)
#define UP_TO_2(F) F(1) F(2)
#define UP_TO_3(F) UP_TO_2(F) F(3)
#define UP_TO_6(F) UP_TO_3(F) F(4) F(5) F(6)
#define UP_TO_7(F) UP_TO_6(F) F(7)
#define UP_TO_10(F) UP_TO_7(F) F(8) F(9) F(10)
#define UP_TO_12(F) UP_TO_10(F) F(11) F(12)
