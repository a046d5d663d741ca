/* Rows of checkpoint tensors to float32. The quantized types are GGUF's. */
#pragma once
#include <stdint.h>

enum ae_source_type {
    AE_SRC_F32,
    AE_SRC_BF16,
    AE_SRC_F16,
    AE_SRC_Q8_0,
    AE_SRC_Q4_0,
    AE_SRC_Q4_1,
    AE_SRC_Q5_0,
    AE_SRC_Q5_1,
    AE_SRC_Q4_K,
    AE_SRC_Q5_K,
    AE_SRC_Q6_K,
    AE_NUM_SOURCE_TYPES
};

/* Values per block; a row holds whole blocks. 1 for the plain types. */
int ae_source_block(int type);

/* Bytes of `count` values, a multiple of the block. */
int64_t ae_source_bytes(int type, int64_t count);

/* out[i] = row[start + i] for i < count, any start and count inside the row. */
void ae_dequantize(float *out, const void *row, int type, int64_t start, int64_t count);

/* How a source's values are coded where runs of 32 columns share a scale and a minimum: value = scale * code
 * + minimum, with codes of `bits` (0: it is not coded so), and the minimum -zero * scale where zero >= 0. */
typedef struct ae_coding {
    int bits, zero;
} ae_coding;

ae_coding ae_source_coding(int type);

/* Scale and minimum of the run of 32 that column `start` of a row lies in; only for coded sources. */
void ae_source_scale(float *scale, float *minimum, const void *row, int type, int64_t start);
