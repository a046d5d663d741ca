/* One table of kernels per instruction-set level. */
#pragma once
#include "cpu.h"

struct ae_peak;
struct ae_sample;

typedef struct ae_kernels {
    ae_kernel ops[AE_NUM_OPS];
    void (*sample)(const struct ae_sample *args, const ae_thread *thread);
    void (*peak)(const struct ae_peak *args, const ae_thread *thread);
    void (*pack_whole)(void *packing, const ae_thread *thread); /* packing: ae_packing (pack.h) */
} ae_kernels;

/* Compilers that know tile registers; with others that level is left out. */
#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define AE_HAS_AMX
#endif
#endif

extern const ae_kernels ae_kernels_portable;
#if defined(__x86_64__)
extern const ae_kernels ae_kernels_avx2;
extern const ae_kernels ae_kernels_avx512;
extern const ae_kernels ae_kernels_avxvnni;
extern const ae_kernels ae_kernels_avx512vnni;
extern const ae_kernels ae_kernels_avx512bf16;
#elif defined(__aarch64__)
extern const ae_kernels ae_kernels_neon;
extern const ae_kernels ae_kernels_neondot;
extern const ae_kernels ae_kernels_neonbf16;
#endif
#if defined(AE_HAS_AMX)
extern const ae_kernels ae_kernels_amx;
#endif

/* The table of a level that this machine has. */
const ae_kernels *ae_kernels_for(enum ae_level level);
