/* Zeroed private memory, page aligned, resident once touched, on huge pages from 2 MiB on (reading weights
 * from 4 KiB pages loses a quarter to a half of the memory's bandwidth). */
#pragma once
#include <stddef.h>

/* NULL with errno set. */
void *ae_map(size_t bytes);
/* Gives the memory back and keeps the addresses: what is touched next is zero. 0, or -1 with errno set. */
int ae_discard(void *address, size_t bytes);
void ae_unmap(void *address, size_t bytes);
