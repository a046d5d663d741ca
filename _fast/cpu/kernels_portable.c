/* Kernels for any 64-bit machine. */
#include "comm.h"
#include "kernels.h"
#include "sample.h"

#define AE_KERNELS ae_kernels_portable
#include "kernels_table.h"
