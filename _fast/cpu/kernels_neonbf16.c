/* Kernels for 64-bit ARM with the dot products of ARMv8.6: of bfloat16, and of unsigned with signed bytes.
 * Neoverse V1 and N2, Apple M2, and later. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm,bf16"))), apply_to = function)
#else
/* Its first scheduler moves loads so far ahead that sums have to leave the registers. */
#pragma GCC optimize("no-schedule-insns")
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm+bf16")
#endif

#define AE_LEVEL_NEON
#define AE_LEVEL_NEONDOT
#define AE_LEVEL_NEONBF16
#define AE_KERNELS ae_kernels_neonbf16
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
