/* A recorded forward pass: an array of ops, replayed by the team. */
#pragma once
#include "kernels.h"
#include "team.h"

/* Runs `count` ops in order, all threads meeting after each. Ops without rows in this step are skipped.
 * -1 in a child of fork(). */
int ae_program_run(ae_team *team, const ae_kernels *kernels, const ae_op *ops, int64_t count,
                   const ae_step *step);
