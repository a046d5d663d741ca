/* Packed weights: what AE_LINEAR reads.
 *
 * A weight [N, K] is cut into panels of 32 rows (output columns), each laid out so that the kernel reads
 * it from front to back once:
 *     f32, f16   [ceil(N/32)][K][32]
 *     bf16       [ceil(N/32)][ceil(K/2)][32][2]      pairs of k side by side; an odd K ends with zeros
 * The columns past N in the last panel are never stored by the kernel; their contents do not matter.
 */
#pragma once
#include "cpu.h"
#include "dequantize.h"
#include "team.h"

#define AE_PANEL 32

/* Bytes of the first k steps of a panel (all of it for k = K). */
static inline int64_t ae_panel_bytes(int64_t k, int type) {
    if (type == AE_F32) return k * AE_PANEL * 4;
    return (type == AE_BF16 ? (k + 1) / 2 * 2 : k) * AE_PANEL * 2;
}

static inline int64_t ae_packed_bytes(int64_t n, int64_t k, int type) {
    return (n + AE_PANEL - 1) / AE_PANEL * ae_panel_bytes(k, type);
}

/* Columns [col_start, col_stop) of the source's rows: rows of a checkpoint's [rows, cols] tensor. */
typedef struct ae_source {
    const char *data;
    int type; /* enum ae_source_type */
    int64_t rows, cols, col_start, col_stop;
} ae_source;

/* Packs the source into rows [row_offset, row_offset + rows) of a packed weight with
 * K = col_stop - col_start, on the team. -1 in a child of fork(). */
int ae_pack(ae_team *team, const ae_source *source, void *dst, int dst_type, int64_t row_offset);

/* Converts the source to rows [row_offset, ...) of a plain row-major [_, K] matrix, on the team. */
int ae_convert(ae_team *team, const ae_source *source, void *dst, int dst_type, int64_t row_offset);
