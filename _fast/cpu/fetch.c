#include "fetch.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* So far ahead lines in order come in time, also where several tiles read a block, the first of them faster than
 * what follows is fetched. */
#define LEAD 24576

int64_t ae_fetch_window = 65536, ae_fetch_lead = 0;

__attribute__((constructor)) static void choose_window(void) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE); /* 0 or -1 where that is not known */
    if (cache <= 0) return;
    ae_fetch_window = 131072;
    while (ae_fetch_window > cache / 8 && ae_fetch_window > 32768) ae_fetch_window /= 2;
#endif
}

#if defined(__x86_64__)
__attribute__((constructor)) static void choose_order(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return;
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255); /* the second part counts where the first is 15 */
    if (family >= 26) ae_fetch_lead = LEAD; /* Zen 5, and later */
}
#endif
