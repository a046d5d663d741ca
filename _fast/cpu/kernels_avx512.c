/* Kernels for x86-64 with the AVX-512 of Skylake servers and later. */
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
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define AE_LEVEL_AVX512
#define AE_KERNELS ae_kernels_avx512
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
