/* Drawing one token per row from a matrix of logits: the arguments, and the noise every backend shares.
 *
 * Order of operations on a row, as `SamplingParams` states it: penalties, banned ids, temperature, top-k,
 * top-p, min-p, draw. Logprobs are of the raw logits, before all of these; the logits are not modified.
 *
 *   repetition r   ids seen in prompt or output: x > 0 ? x / r : x * r
 *   frequency f    x - f * (times the id is in the output)
 *   presence p     x - p if the id is in the output
 *   banned         x = -inf
 *   temperature t  y = x / t in float32; t < AE_GREEDY takes the largest x instead and skips what follows
 *   top-k          the k largest y
 *   top-p          the smallest set of largest y that holds p of the mass of exp(y) that top-k left
 *   min-p          y whose probability is at least min_p times the largest one's
 *   draw           argmax of y + g(seed, position, id) over the ids that are left
 *
 * Ties go to the lower id everywhere.
 *
 * The noise is a pure function, so a request draws the same tokens alone, in any batch and after it was
 * interrupted. All in unsigned 64-bit arithmetic, with mix() the finalizer of splitmix64 (Steele, Lea,
 * Flood 2014) and A = 0x9E3779B97F4A7C15:
 *
 *   key = mix(seed + A * (position + 1))       position: where the drawn token will stand
 *   h   = mix(key + A * (id + 1))
 *   u   = ((h >> 40) + 0.5) * 2^-24            24 random bits, never 0 or 1
 *   g   = -log(-log(u))                        standard Gumbel noise, in [-2.86, 17.33]
 *
 * y is float32, g and y + g are double here; a backend that adds in float32 differs only in near-ties.
 *
 * A row with a NaN, with no finite logit, or with +inf gives token -1, logprob NaN and rank 0.
 */
#pragma once
#include "cpu.h"
#include "head.h"

#define AE_GREEDY 1e-5f

struct ae_team;
struct ae_kernels;

typedef struct ae_sample {
    int64_t rows, vocab;
    const float *logits; /* [rows, vocab] */

    /* What AE_HEAD left of the step: a row with head_k > 0 is drawn from its best, which hold all that top-k
     * leaves of it, and has no logits; it can have no penalties, bans or logprobs. Or NULL: all are full. */
    const int32_t *head_k; /* [rows] */
    const ae_best *best;   /* [rows] */

    /* [rows] each, or NULL: temperature 0, all else off */
    const float *temperature;
    const int32_t *top_k; /* < 1: off */
    const float *top_p;   /* >= 1: off */
    const float *min_p;   /* 0: off */
    const float *presence, *frequency, *repetition;
    const uint64_t *seed;
    const int64_t *position;
    const uint64_t *counts;      /* address of int32 [vocab], occurrences in the output; 0: none */
    const uint64_t *prompt_mask; /* address of uint8 [vocab], 1 where the prompt has the id; 0: none */
    const int32_t *banned_start; /* [rows + 1] row s bans banned[banned_start[s] .. banned_start[s + 1]) */
    const int32_t *banned;       /* ids; those outside the vocabulary are passed over */
    const int32_t *num_logprobs; /* -1: none wanted; n: the drawn token's and the n largest */
    int64_t max_logprobs;        /* width of top_ids and top_logprobs; >= every num_logprobs */
    char *workspace;             /* ae_sample_workspace() bytes, 64-byte aligned */

    int32_t *tokens; /* the outputs; those of logprobs are written where num_logprobs >= 0 */
    float *logprob;
    int32_t *rank;       /* from 1, in the order of the top ids */
    int32_t *top_ids;    /* [rows, max_logprobs] largest first, -1 past the vocabulary's end */
    float *top_logprobs; /* [rows, max_logprobs] */
} ae_sample;

/* What is added up over a row is added in strips of this many elements. */
#define AE_STRIP 1024

static inline int64_t ae_sample_padded(int64_t n) { return (n + 63) / 64 * 64; }

/* The workspace is a desk for each thread: a header (impl_sample.h) and arrays. */
#define AE_DESK_HEADER 640

static inline size_t ae_desk_bytes(int64_t vocab) {
    const int64_t floats = 4 * ae_sample_padded(vocab) + ae_sample_padded(vocab / 16);
    return (size_t)(AE_DESK_HEADER + floats * 4 + ae_sample_padded((vocab / AE_STRIP + 1) * 8));
}

static inline size_t ae_sample_workspace(int num_threads, int64_t vocab) {
    return (size_t)num_threads * ae_desk_bytes(vocab);
}

/* Draws on the whole team. -1 in a child of fork(), which has no team. */
int ae_sample_run(struct ae_team *team, const struct ae_kernels *kernels, const ae_sample *args);
