/* Tile registers: Intel's AMX, in the assembly that this level uses.
 *
 * A processor has eight tiles of up to 16 rows of 64 bytes; TILE_CONFIGURE gives them their sizes, and clears
 * them. TILE_DOT_BF16(c, a, b) adds a [rows of c, pairs] @ b [pairs, 16] to c, where a row of `a` and of `b`
 * holds pairs of neighbours of k: 16 of one row of x, and one of each of 16 columns, as panels have them.
 * TILE_DOT_INT8 has four neighbours in place of pairs, signed bytes in `a` and unsigned ones in `b`, and adds
 * modulo 2^32.
 *
 * Not the compiler's intrinsics: gcc's of version 12 do not tell it that loads read memory, nor how much of
 * it, so that it may move what was written there behind them. Arguments named tile are digits.
 */
#pragma once
#include <stdint.h>

#define TILE_ROWS_MAX 16
#define TILE_ROW_BYTES 64

/* What LDTILECFG reads: palette 1 is the one with eight tiles of a KiB. */
typedef struct tile_config {
    uint8_t palette, start_row, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

#if defined(AE_AMX_MODEL)
#include "amx_model.h" /* beside the tests: the same in C, by the definitions in Intel's manual */
#else

#define TILE_CONFIGURE(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const tile_config *)(config)))
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define TILE_DOT_BF16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define TILE_DOT_INT8(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

#endif

/* Of bytes, or of bf16: a constant chooses. */
#define TILE_DOT(int8, c, a, b)     \
    do {                            \
        if (int8)                   \
            TILE_DOT_INT8(c, a, b); \
        else                        \
            TILE_DOT_BF16(c, a, b); \
    } while (0)
