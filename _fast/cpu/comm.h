/* Collectives between the rank processes of one model, through memory that they share.
 *
 * The mapping: one header, then for every rank two regions, used by turns. A rank that has left meeting i
 * knows that all have read what was written before meeting i - 1, so one meeting per chunk suffices.
 */
#pragma once
#include "cpu.h"

typedef struct ae_comm ae_comm;

/* Bytes of the mapping for regions of `region_bytes`. */
size_t ae_comm_bytes(int world, size_t region_bytes);

/* Maps `fd`, which starts as zeros. NULL with errno set; EINVAL: the ranks disagree about world or
 * region_bytes, or the file is too small. */
ae_comm *ae_comm_open(int fd, int rank, int world, size_t region_bytes);
void ae_comm_close(ae_comm *comm);

/* Copies rank 0's tokens to every rank. All ranks call it, with the same count. */
void ae_comm_broadcast(ae_comm *comm, int32_t *tokens, int64_t count);

/* AE_ALL_REDUCE and AE_ALL_GATHER. All ranks run them in the same order. */
void ae_all_reduce(const ae_op *op, const ae_step *step, const ae_thread *thread);
void ae_all_gather(const ae_op *op, const ae_step *step, const ae_thread *thread);
