/* Kernels for 64-bit ARM as it was from the start: ARMv8.0 with NEON. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__clang__)
/* Its first scheduler moves loads so far ahead that sums have to leave the registers. */
#pragma GCC optimize("no-schedule-insns")
#endif

#define AE_LEVEL_NEON
#define AE_KERNELS ae_kernels_neon
#include "kernels_table.h"
#endif
