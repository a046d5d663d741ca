/* Quantized weights and activations: what integer linears multiply. They have scales in groups, or whole rows are
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
 * Whole rows (AE_WHOLE in place of a group size) are rotated by R (rotate.h) before they are rounded: rows of
 * the weight (w R) / N, and of x (x R). A panel is, with Kp = K rounded up to 32 and Z = 128,
 *     AE_Q8   f32 d[32] · codes [Kp/4][32][4]
 *     AE_Q4   f32 d[32] · for every 32 columns, u8 (least, step)[32] · codes [32/8][32][4] as above
 * where a code c of 4 bits stands for one of 8, least + step * c, which does not pass 255; steps are 1 to 15.
 * Quantized rows are as above, with one group of Kp columns. The product, K at most AE_MOST_WHOLE, is
 *     y = (float)(dot(q_w, q_x) - Z sum) * (d * scale)
 *
 * Whole rows of 16 bits (AE_WHOLE16, for weights of AE_Q16) are rotated too. A value q is 254 q.high + q.low, both
 * parts in [-127, 127]; scale = max|x| / AE_MOST16. A panel and a row are
 *     f32 d[32] · codes [Kp/4][2][32][4], high parts before low ones, Z = 128
 *     int8 high[Kp] · int8 low[Kp] · f32 scale · int32 sum of high parts, of low parts · padding to 64 bytes
 * The product, K at most AE_MOST_WHOLE16, leaves out low parts times low parts, some 2^-13 of the rest:
 *     y = (254 (float)(h_w h_x) + (float)(h_w l_x + l_w h_x)) * (254 d scale)
 * with products like those above. It stands in for bfloat16, of which values have 8 bits.
 *
 * Rounded rows (AE_ROUNDED) are activations for weights of bfloat16, where the processor multiplies such: bf16 x[K],
 * a zero behind the last of an odd K, padding to 64 bytes.
 */
#pragma once
#include "cpu.h"

#define AE_WHOLE (-1)
#define AE_WHOLE16 (-2)
#define AE_ROUNDED (-3)
#define AE_COMPACT (-4) /* of weights of bfloat16: compact.h */
/* Sums of this many products of 8 bits fit 32, and a row as floats half of a thread's scratch. Of pairs, half. */
#define AE_MOST_WHOLE ((int64_t)(AE_SCRATCH / 2 / sizeof(float)))
#define AE_MOST_WHOLE16 (AE_MOST_WHOLE / 2)
/* What a high part of 16 bits is worth, and the largest value: its high part just rounds to 127. */
#define AE_HIGH 254
#define AE_MOST16 (127 * AE_HIGH + 126)

static inline int ae_is_whole(int64_t group) { return group == AE_WHOLE || group == AE_WHOLE16; }

/* Columns of a group. */
static inline int64_t ae_group_width(int64_t k, int64_t group) {
    return ae_is_whole(group) ? (k + 31) / 32 * 32 : group;
}

static inline int64_t ae_groups(int64_t k, int64_t group) {
    return ae_is_whole(group) ? 1 : (k + group - 1) / group;
}

/* Bytes of a code. */
static inline int64_t ae_parts(int64_t group) { return group == AE_WHOLE16 ? 2 : 1; }

/* Bytes of one quantized row, or rounded one. */
static inline int64_t ae_row8_bytes(int64_t k, int64_t group) {
    if (group == AE_ROUNDED) return ((k + 1) / 2 * 4 + 63) / 64 * 64;
    return (ae_groups(k, group) * (ae_parts(group) * (ae_group_width(k, group) + 4) + 4) + 63) / 64 * 64;
}

static inline float *ae_row8_scales(const int8_t *row8, int64_t k, int64_t group) {
    return (float *)(row8 + ae_parts(group) * ae_groups(k, group) * ae_group_width(k, group));
}

static inline int32_t *ae_row8_sums(const int8_t *row8, int64_t k, int64_t group) {
    return (int32_t *)(ae_row8_scales(row8, k, group) + ae_groups(k, group));
}

/* Of a panel of whole rows: what lies before its codes, and before those of 32 columns of 4 bits. */
#define AE_WHOLE_SCALES 128
#define AE_WHOLE_STEPS 64

/* Bytes of 32 columns of a panel of whole rows, and of all of it. */
static inline int64_t ae_whole_part_bytes(int type) {
    return type == AE_Q16 ? 2048 : type == AE_Q8 ? 1024 : AE_WHOLE_STEPS + 512;
}

static inline int64_t ae_whole_panel_bytes(int64_t k, int type) {
    return AE_WHOLE_SCALES + ae_group_width(k, AE_WHOLE) / 32 * ae_whole_part_bytes(type);
}

/* Bytes of one group of a packed panel. */
static inline int64_t ae_group_bytes(int type, int64_t group, int minimum) {
    return 64 + (minimum ? 64 : 0) + (type == AE_Q8 ? group : group / 2) * 32;
}
