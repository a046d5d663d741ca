/* A persistent team of threads: the caller is thread 0, the others sleep between jobs. */
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
