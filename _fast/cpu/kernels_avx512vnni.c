/* Kernels for x86-64 with AVX-512 and its 8-bit dot product: Intel Cascade Lake and Ice Lake. */
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
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

#define AE_LEVEL_AVX512
#define AE_LEVEL_AVX512VNNI
#define AE_KERNELS ae_kernels_avx512vnni
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
