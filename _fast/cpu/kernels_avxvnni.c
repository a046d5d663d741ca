/* Kernels for x86-64 with AVX2 and its 8-bit dot product: Intel's client processors since Alder Lake. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#define AE_LEVEL_AVX2
#define AE_LEVEL_AVXVNNI
#define AE_KERNELS ae_kernels_avxvnni
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
