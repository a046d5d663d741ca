#include "program.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
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

/* Tokens of a step whose ops are short. */
#define SHORT_STEP 64

static void replay_ops(void *arg, const ae_thread *thread) {
    const replay *r = arg;
    ae_fetch fetch = {0};
    ae_thread view = *thread;
    view.fetch = &fetch;
    int64_t upcoming = 0;
    for (int64_t i = thread->first; i < r->count; i++) {
        const ae_op *op = &r->ops[i];
        if (ae_rows_of(op, r->step) == 0) continue;
        if (upcoming <= i) upcoming = i + 1;
        while (upcoming < r->count && !reads_weights(&r->ops[upcoming], r->step)) upcoming++;
        view.upcoming = upcoming < r->count ? &r->ops[upcoming] : NULL;
        r->kernels->ops[op->code](op, r->step, &view);
        if (i + 1 < r->count) ae_next_op(&view, i + 1); /* the job's end is a meeting too */
    }
}

int ae_program_run(ae_team *team, const ae_kernels *kernels, const ae_op *ops, int64_t count,
                   const ae_step *step) {
    replay r = {kernels, ops, count, step};
    return (step->num_tokens > SHORT_STEP ? ae_team_run : ae_team_run_short)(team, replay_ops, &r);
}

#if defined(__x86_64__)
/* CPUID leaf 7.1, EAX bit 4, which gcc has no name for in __builtin_cpu_supports before version 13. */
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

/* Tiles, their products of bf16 and of 8 bits (CPUID leaf 7, EDX), and an operating system that keeps them
 * (XCR0: their sizes and their contents). Linux gives the contents, state 18, only to processes that ask; all
 * threads of this one may use them then. */
static int has_amx(void) {
#if defined(AE_AMX_MODEL)
    return 1;
#elif defined(AE_HAS_AMX)
    const unsigned features = 1u << 22 | 1u << 24 | 1u << 25, states = 3u << 17;
    const long request_permission = 0x1023; /* ARCH_REQ_XCOMP_PERM, which older headers lack */
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & features) != features) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & states) == states && syscall(SYS_arch_prctl, request_permission, 18L) == 0;
#else
    return 0;
#endif
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
        case AE_AMX: return avx512vnni && has_amx();
        default: return 0;
    }
}
#elif defined(__aarch64__)
/* Bits that older headers have no names for. */
#define HAS_DOTPROD (getauxval(AT_HWCAP) >> 20 & 1)
#define HAS_I8MM (getauxval(AT_HWCAP2) >> 13 & 1)
#define HAS_BF16 (getauxval(AT_HWCAP2) >> 14 & 1)

int ae_supports_level(enum ae_level level) {
    switch (level) {
        case AE_PORTABLE:
        case AE_NEON: return 1;
        case AE_NEONDOT: return HAS_DOTPROD;
        case AE_NEONBF16: return HAS_DOTPROD && HAS_I8MM && HAS_BF16;
        default: return 0;
    }
}
#else
int ae_supports_level(enum ae_level level) { return level == AE_PORTABLE; }
#endif

const ae_kernels *ae_kernels_for(enum ae_level level) {
    switch (level) {
#if defined(AE_HAS_AMX)
        case AE_AMX: return &ae_kernels_amx;
#endif
#if defined(__x86_64__)
        case AE_AVX512BF16: return &ae_kernels_avx512bf16;
        case AE_AVX512VNNI: return &ae_kernels_avx512vnni;
        case AE_AVX512: return &ae_kernels_avx512;
        case AE_AVXVNNI: return &ae_kernels_avxvnni;
        case AE_AVX2: return &ae_kernels_avx2;
#elif defined(__aarch64__)
        case AE_NEONBF16: return &ae_kernels_neonbf16;
        case AE_NEONDOT: return &ae_kernels_neondot;
        case AE_NEON: return &ae_kernels_neon;
#endif
        default: return &ae_kernels_portable;
    }
}
