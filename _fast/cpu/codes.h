/* Weights [N, K] that a checkpoint keeps as codes of 4 or 8 bits in 32-bit words, scales and zero points in
 * tensors of their own:
 *     value(n, k) = (code(n, k) - zero(n, g)) * scale(n, g),    g = k / group, or group_of[k]
 * How the words lie differs by format; these structures say it for all of them.
 */
#pragma once
#include <stdint.h>

/* A matrix of numbers, a word of which holds a run of 32 / bits of them: of one column if it runs `down` the
 * rows, else of one row. Steps are in words, from one row (or run of rows) and column to the next. */
typedef struct ae_numbers {
    const char *words; /* of any alignment */
    int64_t row_step, col_step;
    int down;
    int interleaved; /* of runs down the rows: the even numbers lie below the odd ones */
} ae_numbers;

typedef struct ae_codes {
    int bits;
    int zero_shift; /* stored zero points are smaller by this, modulo 2^bits */
    int scale_type; /* AE_SRC_F32, AE_SRC_BF16 or AE_SRC_F16 */
    int64_t group;
    ae_numbers code, zero; /* zero.words NULL: 2^(bits - 1) everywhere */
    const char *scale;
    int64_t scale_row_step, scale_col_step; /* in scales */
    const int32_t *group_of;                /* [K]; NULL: groups are neighbours */
} ae_codes;

/* out[r * stride + i] = code(row + r, start + i) */
void ae_read_codes(uint8_t *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows, int64_t start,
                   int64_t count);

/* Scale and zero point of a row's group. */
void ae_read_scale(float *scale, int *zero, const ae_codes *c, int64_t row, int64_t group);

/* out[r * stride + i] = value(row + r, start + i); the product is exact, unless scales are float32. */
void ae_read_values(float *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows, int64_t start,
                    int64_t count);
