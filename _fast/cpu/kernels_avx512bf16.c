/* Kernels for x86-64 with AVX-512 and its bfloat16 dot product: AMD Zen 4, Intel Cooper Lake, and later. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#endif

#define AE_LEVEL_AVX512
#define AE_LEVEL_AVX512VNNI
#define AE_LEVEL_AVX512BF16
#define AE_KERNELS ae_kernels_avx512bf16
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
