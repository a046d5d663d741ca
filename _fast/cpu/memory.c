#include "memory.h"

#include <stdint.h>
#include <sys/mman.h>

#define HUGE ((size_t)2 << 20)

/* What is mapped for `bytes`: whole huge pages if there is one, else whole small ones. */
static size_t mapped(size_t bytes) {
    size_t unit = bytes >= HUGE ? HUGE : 4096;
    return bytes ? (bytes + unit - 1) / unit * unit : unit;
}

void *ae_map(size_t bytes) {
    size_t size = mapped(bytes), slack = bytes >= HUGE ? HUGE : 0;
    char *p = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (slack == 0) return p;
    size_t before = (HUGE - (uintptr_t)p % HUGE) % HUGE, after = slack - before;
    if (before) munmap(p, before);
    if (after) munmap(p + before + size, after);
    madvise(p + before, size, MADV_HUGEPAGE); /* advice only: small pages are slower, not wrong */
    return p + before;
}

int ae_discard(void *address, size_t bytes) { return madvise(address, mapped(bytes), MADV_DONTNEED); }

void ae_unmap(void *address, size_t bytes) { munmap(address, mapped(bytes)); }
