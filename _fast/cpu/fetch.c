#include "fetch.h"

#include <unistd.h>

int64_t ae_fetch_window = 65536;

__attribute__((constructor)) static void choose_window(void) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE); /* 0 or -1 where that is not known */
    if (cache <= 0) return;
    ae_fetch_window = 131072;
    while (ae_fetch_window > cache / 8 && ae_fetch_window > 32768) ae_fetch_window /= 2;
#endif
}
