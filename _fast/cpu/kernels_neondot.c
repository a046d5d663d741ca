/* Kernels for 64-bit ARM with NEON's 8-bit dot product: Cortex-A75, Neoverse N1, Apple M1, and later. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
/* Its first scheduler moves loads so far ahead that sums have to leave the registers. */
#pragma GCC optimize("no-schedule-insns")
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define AE_LEVEL_NEON
#define AE_LEVEL_NEONDOT
#define AE_KERNELS ae_kernels_neondot
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
