/* The best elements of a row of logits: what AE_HEAD keeps of a row, and what the sampler draws from. */
#pragma once
#include <stdint.h>

#define AE_BEST 64

typedef struct ae_best {
    int32_t count; /* of words; -1: the row has a NaN or +inf and is unusable */
    float bound;   /* an element below it does not enter any more */
    uint64_t words[AE_BEST]; /* ascending: element and id of the best comes first, see impl_best.h */
} ae_best;
