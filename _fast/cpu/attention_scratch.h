/* What a thread of attention has at hand: a tile of lines, a tile of keys, and what is between them. */
#pragma once
#include "attention_keys.h"

/* With LINES lines these are the accumulators of a register block. */
#if defined(AE_LEVEL_AVX512) || defined(AE_LEVEL_NEON)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#define LINES 6
#define BATCH 48 /* lines whose scores are at hand at once */

/* Lines of one plan row that share a KV head, and the span of what they see, or of one split of that. */
typedef struct line_tile {
    span keys;
    int64_t row, first_line, lines;
    float *partials; /* of the row (see `work`), at the split that this is; NULL: all splits */
    const float *query[TILE_LINES];
    int32_t first[TILE_LINES], last[TILE_LINES]; /* line i sees positions [first, last) */
} line_tile;

/* What the weights of lines that see [from, to) of a tile of keys are counted in (attention_codes.h). */
typedef struct weight_units {
    float of[TILE_KEYS], unit;
    int32_t from, to;
} weight_units;

/* A thread's scratch. */
typedef struct attention_scratch {
    tile_data data;
    float sums[2][TILE_LINES * MAX_DIM / 2], *acc; /* rows of `padded`; `acc`: those of a split, one of both */
    float scores[BATCH * TILE_KEYS]; /* of line i at row i % BATCH */
    union { /* of lines, rounded */
        uint16_t pairs[TILE_LINES * MAX_DIM / 2]; /* rows of `padded` */
        int8_t codes[TILE_LINES * (MAX_DIM / 2 + 64)]; /* quantized rows, AE_WHOLE; half as many where MAX_DIM long */
    } queries;
    float l[TILE_LINES * W], m[TILE_LINES]; /* a line's weights summed lane by lane, and its maximum */
    float drop[TILE_LINES], factor[TILE_LINES], merged_m[TILE_LINES], merged_l[TILE_LINES];
    int32_t from[TILE_LINES], to[TILE_LINES]; /* what line i sees of this tile of keys; from >= to: nothing */
    weight_units units;
    tile_rows rows;
    run_queue ahead;
    line_tile tiles[2];
} attention_scratch;

_Static_assert(sizeof(attention_scratch) <= AE_SCRATCH, "the scratch of attention");
