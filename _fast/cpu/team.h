/* A persistent team of threads: the caller is thread 0, the others sleep between jobs.
 *
 * Where the program that embeds us runs on the same processors, it often takes one of them just as a job begins, to
 * handle what the last one has given: 0.2 ms in which a thread cannot come. */
#pragma once
#include "cpu.h"

typedef struct ae_team ae_team;
typedef void (*ae_job)(void *arg, const ae_thread *thread);

/* NULL, with errno set, if memory or threads cannot be had. */
ae_team *ae_team_create(int nthreads);

/* Ends the threads. In a child of fork(), where they do not exist, only gives the memory back. */
void ae_team_destroy(ae_team *team);

/* Runs job(arg, thread) on every thread; returns when all have ended. One job at a time: concurrent
 * callers queue. -1 in a child of fork(), which has no team. */
int ae_team_run(ae_team *team, ae_job job, void *arg);

/* The same for a job of short ops, on which a thread is better off alone than waiting for others: it begins without
 * those that are late. They come in at the next ae_next_op(), or not at all. */
int ae_team_run_short(ae_team *team, ae_job job, void *arg);
