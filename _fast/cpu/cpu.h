/* The contract between the step program, its kernels and the thread team.
 *
 * A step program is an array of `ae_op`, recorded once from the model's forward. A step replays it:
 * every thread of the team walks the array and runs its share of each op; the team meets at a
 * barrier after every op. Sizes fixed by the model are in the op; what changes per step (how many
 * tokens, where they stand) is in `ae_step`. Activations are float32, row-major, contiguous; weights
 * and the KV cache have the type named in the op.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "fetch.h"

/* AE_Q16, AE_Q8, AE_Q4: weights of so many bits, multiplied in integers (quantized.h). AE_I8: keys and values
 * of 8 bits with a scale each (attention.h). */
enum ae_dtype { AE_F32 = 0, AE_BF16 = 1, AE_F16 = 2, AE_Q8 = 3, AE_Q4 = 4, AE_I8 = 5, AE_Q16 = 6 };

/* How AE_LINEAR ends. */
enum ae_mode {
    AE_STORE, /* out = y */
    AE_ADD,   /* out += y */
    AE_GATED  /* out [M,N/2] = silu(gate) * up, where y's panels of 32 columns alternate gate, up, ... */
};

/* M, the number of rows an op works on. */
enum ae_rows { AE_TOKENS = 0, AE_SAMPLES = 1 };

typedef struct ae_step {
    int32_t num_tokens;  /* T: tokens computed in this step */
    int32_t num_seqs;    /* R: plan rows; row r owns tokens [query_start[r], query_start[r + 1]) */
    int32_t num_samples; /* S: rows that are sampled from */
    int32_t table_stride;
    const int32_t *token_ids;   /* [T] */
    const int32_t *positions;   /* [T] position of each token in its sequence */
    const int32_t *token_row;   /* [T] plan row of each token */
    const int32_t *query_start; /* [R + 1] */
    const int32_t *context_len; /* [R] positions [0, context_len) are visible after this step's writes */
    const int32_t *row_slot;    /* [R] block_table + row_slot[r] * table_stride is row r's table */
    const int32_t *block_table; /* [slots, table_stride] */
    const int32_t *sample_rows; /* [S] index into [0, T) of each sampled token */
    const int32_t *head_k;         /* [S] what AE_HEAD keeps of each row; NULL: all of it */
    const float *head_temperature; /* [S] the divisor of logits that are compared */
} ae_step;

enum ae_code {
    /* p0 out f32 [M,H] · p1 table of the ids [n2, n2+n3) · n0 H · n1 its type. n4 0: plain rows [n3, H];
     * n4 1: a packed weight of N = n3, K = H, with n5 and n6 as n4 and n5 of AE_LINEAR.
     * Ids outside [n2, n2+n3) give zeros (another rank has them). */
    AE_EMBED,
    /* Where an op's output is read by quantized linears, p4 takes it as quantized rows of group n3
     * (quantized.h; n3 AE_ROUNDED: as rounded rows), and p0 may be NULL; else p4 is NULL. So it is in
     * AE_RMS_NORM, AE_SELECT and, but not for whole rows, which many threads write, AE_LINEAR with AE_GATED and
     * AE_ATTENTION.
     *
     * p0 out · p1 x · p2 weight f32 [H] · n0 H · f0 eps:  out = x / sqrt(mean(x^2) + eps) * weight */
    AE_RMS_NORM,
    /* p0 out · p1 x [M,K], for quantized weights quantized rows of group n4 · p2 weight, packed
     * (pack.h) · p3 bias f32 [N] or NULL · n0 N · n1 K · n2 weight type · n4 group size and n5 has-minimum of
     * quantized weights, or n4 AE_COMPACT (compact.h) · n6 mode (enum ae_mode) · n7 whether x is rounded rows, for weights of bf16 at levels
     * with BF16_DOT (simd.h) but AE_AMX:  y = x @ weight.T + bias */
    AE_LINEAR,
    /* p0 qkv f32 [T, (Hq + 2 Hk) D], rotated in place · p1 cos_sin f32 [positions, n3]: n3/2 cosines
     * then n3/2 sines · p2 K cache · p3 V cache: blocks of [Hk, block, D], n8 bytes from block to block;
     * those of AE_I8 have scales behind them (attention.h) · p4, p5 weight f32 [D] of the per-head RMS norm
     * of q and k, or NULL · p6 f32 [(Hq + 2 Hk) D], the bias in all rows of qkv, or NULL · p7 mean row of p1 · n0
     * Hq · n1 Hk · n2 D, for AE_I8 at most 512 · n3 rotary dim · n4 block size · n5 cache type · f0 eps of the
     * norms. p6 and p7 are read for AE_I8 without p5 (attention.h).
     * Norm, then rotate halves (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), then write k and v at the
     * token's position: block_table[pos / block], row pos % block. */
    AE_ROPE_KV,
    /* p0 out f32 [T, Hq D], NULL if only p4 is wanted · p1 qkv · p2 K cache · p3 V cache, as for AE_ROPE_KV
     * · p4 quantized rows of group n3, of which D must be a multiple · n0 Hq · n1 Hk · n2 D · n4 block size ·
     * n5 cache type · n6 window (0: none) · n8 bytes from block to block · f0 scale.  Causal softmax
     * attention of every token over the positions (pos - window, pos] of its own sequence; query head h reads
     * KV head h / (Hq/Hk). p7 workspace of n7 bytes (see attention.h), or NULL · D is at most 512. */
    AE_ATTENTION,
    /* p0 out [S,H] · p1 x [T,H] · n0 H:  out[i] = x[sample_rows[i]] */
    AE_SELECT,
    /* p0 x [M,N], summed over all ranks in rank order, in place · p1 ae_comm · n0 N */
    AE_ALL_REDUCE,
    /* p0 out [M, n1] · p1 x [M,N] · p2 ae_comm · n0 N · n1 total width · n2 first column of this rank.
     * The ranks' column slices side by side, on every rank. */
    AE_ALL_GATHER,
    /* p4 quantized rows of group n3 · p1 x f32 [M,K] · n0 K */
    AE_QUANTIZE,
    /* p0 logits f32 [M,N] · p1, p2, p3, n0 N, n1, n2, n4, n5, n7 as in AE_LINEAR · p4 ae_best [threads][M]
     * (head.h), of which the first M are results · rows is AE_SAMPLES:  y = x @ weight.T + bias.
     * Row s is stored where head_k[s] < 1; else only the head_k[s] <= 64 best of y / head_temperature[s] are
     * kept, ties to the lower id. */
    AE_HEAD,
    AE_NUM_OPS
};

typedef struct ae_op {
    int32_t code;
    int32_t rows; /* enum ae_rows */
    void *p[8];
    int64_t n[9];
    float f[4];
} ae_op;

struct ae_team;

/* One thread's view of the team while it runs an op: it is thread `tid` of the `nthreads` that run it. */
typedef struct ae_thread {
    int tid, nthreads;
    int index, order; /* which of all threads of the team it is, and the how-manieth to come to the job (team.h) */
    int64_t first;    /* the op of the job that it begins with: 0 unless it was late */
    struct ae_team *team;
    void *scratch; /* this thread's own, 64-byte aligned, AE_SCRATCH bytes, not kept between ops */
    ae_fetch *fetch;       /* this thread's own; kept from op to op */
    const ae_op *upcoming; /* the next op of the program that reads weights, or NULL */
} ae_thread;

#define AE_SCRATCH ((size_t)1 << 20)

typedef void (*ae_kernel)(const ae_op *op, const ae_step *step, const ae_thread *thread);

/* All threads that run the op meet; memory written before is seen after. */
void ae_barrier(const ae_thread *thread);

/* The same between ops. Threads that have come meanwhile run the next one too, which is op `next` of the job. */
void ae_next_op(ae_thread *thread, int64_t next);

/* Hands out [0, total) in chunks to whichever thread asks; returns the first index of the chunk or -1.
 * At most one such loop between two barriers: each barrier resets the counter. */
int64_t ae_next(const ae_thread *thread, int64_t total, int64_t chunk);

/* Takes the next of `total` pieces of the share of thread `owner`: its index, or -1 if all are taken. So threads
 * that have done their shares help others. At most one such loop between two barriers. */
int64_t ae_take(const ae_thread *thread, int owner, int64_t total);

/* An even static share [*lo, *hi) of [0, total), in multiples of grain. */
static inline void ae_share(const ae_thread *t, int64_t total, int64_t grain, int64_t *lo, int64_t *hi) {
    int64_t units = (total + grain - 1) / grain;
    int64_t a = units * t->tid / t->nthreads * grain, b = units * (t->tid + 1) / t->nthreads * grain;
    *lo = a < total ? a : total;
    *hi = b < total ? b : total;
}

/* Brings n floats nearer that will be read soon: what another thread wrote lies in its caches. */
static inline void ae_prefetch(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

static inline int64_t ae_rows_of(const ae_op *op, const ae_step *step) {
    return op->rows == AE_TOKENS ? step->num_tokens : step->num_samples;
}

/* Instruction-set levels, of each architecture the best last; one table of kernels each
 * (kernels_<level>.c). */
enum ae_level {
    AE_PORTABLE,
    AE_AVX2, AE_AVXVNNI, AE_AVX512, AE_AVX512VNNI, AE_AVX512BF16, AE_AMX,
    AE_NEON, AE_NEONDOT, AE_NEONBF16
};

/* Whether this machine can run a level: not every one below the best. */
int ae_supports_level(enum ae_level level);
