/* Rotation of rows before they are rounded to 8 bits, as in QuaRot (arXiv 2404.00456): an orthogonal transform
 * spreads the few outliers of a row over all of it, so that one scale suits the whole row.
 *
 * R is the Kronecker product of Hartley matrices H[i][j] = cos(2 pi i j / f) + sin(2 pi i j / f), one for every
 * prime factor f <= AE_MOST_FACTOR of the width; for f = 2 that is Hadamard's, and greater factors are left
 * alone. R is symmetric and R R = N I, N being the product of the factors taken. So with both sides rotated
 *     x w = (x R) (w R) / N
 * and the same transform takes a row back.
 */
#pragma once
#include <stdint.h>

#define AE_MOST_FACTOR 61

/* ae_cos[f][i] = cos(2 pi i / f) and sines, of odd f. */
extern float ae_cos[AE_MOST_FACTOR + 1][AE_MOST_FACTOR + 1], ae_sin[AE_MOST_FACTOR + 1][AE_MOST_FACTOR + 1];

/* N of a width. */
static inline int64_t ae_rotation_norm(int64_t k) {
    int64_t norm = k & -k;
    for (int64_t f = 3; f <= AE_MOST_FACTOR; f += 2)
        while (k / norm % f == 0 && k > 0) norm *= f;
    return norm;
}
