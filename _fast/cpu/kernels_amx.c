/* Kernels for x86-64 with AVX-512 and tile registers: Intel Sapphire Rapids and later. Of VDPBF16PS no use is
 * made: see impl_amx.h. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#if defined(AE_HAS_AMX)
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni," \
                          "amx-tile,amx-bf16,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-bf16,amx-int8")
#endif

#define AE_LEVEL_AVX512
#define AE_LEVEL_AVX512VNNI
#define AE_LEVEL_AMX
#define AE_KERNELS ae_kernels_amx
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
