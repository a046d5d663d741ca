/* Quantized weights and activations: what integer linears multiply. They have scales in groups, or rows are
 * rotated and have one scale each.
 *
 * In groups, a quantized weight [N, K] has a scale d, and maybe a minimum m, for every row and group of G columns
 * (32, 64 or 128; the last group may be short, its missing columns count as zeros of x). Its codes q are
 * unsigned, 8 or 4 bits wide:
 *     without minimum    w = d (q - Z),  Z = 128 for AE_Q8, 8 for AE_Q4
 *     with minimum       w = d q + m
 * d and m are half precision. Packed as panels of 32 rows like other weights (pack.h), a panel is for every
 * group, one after the other:
 *     f16 d[32] · f16 m[32] if there are minima · codes
 *     AE_Q8 codes    [G/4][32][4]      4 neighbours of k side by side: what the dot products take
 *     AE_Q4 codes    [G/8][32][4]      byte j of a lane holds k + j in its low nibble, k + 4 + j in its high
 * Short groups are padded to whole groups with codes that the kernel multiplies by zero.
 *
 * Quantized rows are activations [M, K] with one scale per row and group:
 *     int8 q[Kp] · f32 scale[Kp/G] · int32 sum[Kp/G] · padding to 64 bytes,  Kp = K rounded up to groups
 * scale = max|x| / 127 over the group, q = x (127 / max|x|) rounded to nearest even (zeros beyond K), sum =
 * sum of q. A group of zeros (or below 2^-120) has scale 0; a group with a NaN or an infinity has scale NaN
 * and zeros, so that it shows.
 *
 * The product is, over blocks of whole groups that K and G determine, in ascending order, in float32: for
 * every group of the block
 *     y += (d * (float)(dot(q_w, q_x) - Z sum)) * scale      then, with minima, for every group
 *     y += m * (scale * sum)
 * with the dot product exact in 32-bit integers: the same for every tiling, batch and number of threads.
 *
 * Whole rows (AE_WHOLE in place of a group size, only for AE_Q8 without minima) are rotated by R (rotate.h)
 * before they are rounded: rows of the weight (w R) / N, and of x (x R). A panel is
 *     f32 d[32] · codes [Kp/4][32][4],  Kp = K rounded up to 32, Z = 128
 * and quantized rows are as above, with one group of Kp columns. The product, K at most AE_MOST_WHOLE, is
 *     y = (float)(dot(q_w, q_x) - Z sum) * (d * scale)
 */
#pragma once
#include "cpu.h"

#define AE_WHOLE (-1)
/* Sums of this many products of 8 bits fit 32, and a row as floats half of a thread's scratch. */
#define AE_MOST_WHOLE ((int64_t)(AE_SCRATCH / 2 / sizeof(float)))

/* Columns of a group. */
static inline int64_t ae_group_width(int64_t k, int64_t group) {
    return group == AE_WHOLE ? (k + 31) / 32 * 32 : group;
}

static inline int64_t ae_groups(int64_t k, int64_t group) {
    return group == AE_WHOLE ? 1 : (k + group - 1) / group;
}

/* Bytes of one quantized row. */
static inline int64_t ae_row8_bytes(int64_t k, int64_t group) {
    return (ae_groups(k, group) * (ae_group_width(k, group) + 8) + 63) / 64 * 64;
}

static inline float *ae_row8_scales(const int8_t *row8, int64_t k, int64_t group) {
    return (float *)(row8 + ae_groups(k, group) * ae_group_width(k, group));
}

static inline int32_t *ae_row8_sums(const int8_t *row8, int64_t k, int64_t group) {
    return (int32_t *)(ae_row8_scales(row8, k, group) + ae_groups(k, group));
}

/* Bytes of a packed panel of whole rows. */
static inline int64_t ae_whole_panel_bytes(int64_t k) { return 128 + 32 * ae_group_width(k, AE_WHOLE); }

/* Bytes of one group of a packed panel. */
static inline int64_t ae_group_bytes(int type, int64_t group, int minimum) {
    return 64 + (minimum ? 64 : 0) + (type == AE_Q8 ? group : group / 2) * 32;
}
