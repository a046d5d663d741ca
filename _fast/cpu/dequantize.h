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
