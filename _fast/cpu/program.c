#include "program.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

typedef struct replay {
    const ae_kernels *kernels;
    const ae_op *ops;
    int64_t count;
    const ae_step *step;
} replay;

static int reads_weights(const ae_op *op, const ae_step *step) {
    return (op->code == AE_LINEAR || op->code == AE_HEAD) && ae_rows_of(op, step) > 0;
}

static void replay_ops(void *arg, const ae_thread *thread) {
    const replay *r = arg;
    ae_fetch fetch = {0};
    ae_thread view = *thread;
    view.fetch = &fetch;
    int64_t upcoming = 0;
    for (int64_t i = 0; i < r->count; i++) {
        const ae_op *op = &r->ops[i];
        if (ae_rows_of(op, r->step) == 0) continue;
        if (upcoming <= i) upcoming = i + 1;
        while (upcoming < r->count && !reads_weights(&r->ops[upcoming], r->step)) upcoming++;
        view.upcoming = upcoming < r->count ? &r->ops[upcoming] : NULL;
        r->kernels->ops[op->code](op, r->step, &view);
        if (i + 1 < r->count) ae_barrier(thread); /* the job's end is a barrier too */
    }
}

int ae_program_run(ae_team *team, const ae_kernels *kernels, const ae_op *ops, int64_t count,
                   const ae_step *step) {
    replay r = {kernels, ops, count, step};
    return ae_team_run(team, replay_ops, &r);
}

#if defined(__x86_64__)
/* CPUID leaf 7.1, EAX bit 4, which gcc has no name for in __builtin_cpu_supports before version 13. */
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

int ae_supports_level(enum ae_level level) {
    __builtin_cpu_init();
    /* F16C is older than AVX2: no processor has the latter alone. */
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const int avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    switch (level) {
        case AE_PORTABLE: return 1;
        case AE_AVX2: return avx2;
        case AE_AVXVNNI: return avx2 && has_avxvnni();
        case AE_AVX512: return avx512;
        case AE_AVX512VNNI: return avx512vnni;
        case AE_AVX512BF16: return avx512vnni && __builtin_cpu_supports("avx512bf16");
        default: return 0;
    }
}
#else
int ae_supports_level(enum ae_level level) { return level == AE_PORTABLE; }
#endif

const ae_kernels *ae_kernels_for(enum ae_level level) {
    switch (level) {
#if defined(__x86_64__)
        case AE_AVX512BF16: return &ae_kernels_avx512bf16;
        case AE_AVX512VNNI: return &ae_kernels_avx512vnni;
        case AE_AVX512: return &ae_kernels_avx512;
        case AE_AVXVNNI: return &ae_kernels_avxvnni;
        case AE_AVX2: return &ae_kernels_avx2;
#endif
        default: return &ae_kernels_portable;
    }
}
