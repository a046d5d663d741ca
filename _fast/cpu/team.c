#define _GNU_SOURCE

#include "team.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "futex.h"

typedef struct member {
    ae_thread view;
    pthread_t pthread;
    /* Of ae_take: the meeting's generation, then, in 32 bits, what is taken since. */
    _Alignas(64) atomic_ullong taken;
} member;

struct ae_team {
    ae_meeting meeting;
    _Alignas(64) atomic_llong next; /* of ae_next; zeroed by whoever opens the meeting */
    _Alignas(64) int nthreads;
    int started; /* threads that exist, the caller included; nthreads unless creation failed */
    int spin;
    pid_t owner;
    ae_job job; /* NULL ends the threads */
    void *arg;
    char *scratch;
    pthread_mutex_t busy;
    member members[];
};

void ae_barrier(const ae_thread *thread) {
    ae_team *team = thread->team;
    unsigned generation;
    if (ae_meeting_arrive(&team->meeting, team->nthreads, &generation)) {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        ae_meeting_open(&team->meeting, 0);
    } else {
        ae_meeting_wait(&team->meeting, generation, team->spin, 0);
    }
}

int64_t ae_next(const ae_thread *thread, int64_t total, int64_t chunk) {
    int64_t i = atomic_fetch_add_explicit(&thread->team->next, chunk, memory_order_relaxed);
    return i < total ? i : -1;
}

int64_t ae_take(const ae_thread *thread, int owner, int64_t total) {
    atomic_ullong *taken = &thread->team->members[owner].taken;
    const unsigned long long now =
        (unsigned long long)atomic_load_explicit(&thread->team->meeting.generation, memory_order_relaxed) << 32;
    unsigned long long was = atomic_load_explicit(taken, memory_order_relaxed);
    while (was >> 32 != now >> 32)
        if (atomic_compare_exchange_weak_explicit(taken, &was, now + 1, memory_order_relaxed, memory_order_relaxed))
            return total > 0 ? 0 : -1;
    if ((int64_t)(was - now) >= total) return -1;
    const int64_t i = (int64_t)(atomic_fetch_add_explicit(taken, 1, memory_order_relaxed) - now);
    return i < total ? i : -1;
}

static void *thread_main(void *arg) {
    const ae_thread *thread = arg;
    ae_team *team = thread->team;
    for (;;) {
        ae_barrier(thread);
        if (team->job == NULL) return NULL;
        team->job(team->arg, thread);
        ae_barrier(thread);
    }
}

static void run(ae_team *team, ae_job job, void *arg) {
    const ae_thread *caller = &team->members[0].view;
    team->job = job;
    team->arg = arg;
    ae_barrier(caller);
    if (job == NULL) return;
    job(arg, caller);
    ae_barrier(caller);
}

int ae_team_run(ae_team *team, ae_job job, void *arg) {
    if (getpid() != team->owner) return -1;
    pthread_mutex_lock(&team->busy);
    run(team, job, arg);
    pthread_mutex_unlock(&team->busy);
    return 0;
}

ae_team *ae_team_create(int nthreads) {
    size_t size = sizeof(ae_team) + sizeof(member) * (size_t)nthreads;
    ae_team *team = aligned_alloc(64, (size + 63) / 64 * 64);
    if (team == NULL) return NULL;
    memset(team, 0, size);
    team->nthreads = nthreads;
    team->spin = ae_num_cpus() >= nthreads;
    team->owner = getpid();
    pthread_mutex_init(&team->busy, NULL);
    size_t scratch = AE_SCRATCH * (size_t)nthreads;
    team->scratch = mmap(NULL, scratch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (team->scratch == MAP_FAILED) {
        free(team);
        return NULL;
    }
    /* Signals stay with the program that embeds us: its threads handle them, ours never do. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (int i = 0; i < nthreads; i++) {
        char *own = team->scratch + AE_SCRATCH * (size_t)i;
        team->members[i].view = (ae_thread){.tid = i, .nthreads = nthreads, .team = team, .scratch = own};
    }
    for (team->started = 1; team->started < nthreads; team->started++) {
        member *m = &team->members[team->started];
        error = pthread_create(&m->pthread, NULL, thread_main, &m->view);
        if (error) break;
        char name[16];
        snprintf(name, sizeof name, "ae-cpu-%d", team->started);
        pthread_setname_np(m->pthread, name);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        ae_team_destroy(team);
        errno = error;
        return NULL;
    }
    return team;
}

void ae_team_destroy(ae_team *team) {
    if (getpid() == team->owner) {
        /* The caller stands in for threads that could not be created. */
        unsigned generation;
        for (int i = team->started; i < team->nthreads; i++)
            ae_meeting_arrive(&team->meeting, team->nthreads, &generation);
        run(team, NULL, NULL);
        for (int i = 1; i < team->started; i++) pthread_join(team->members[i].pthread, NULL);
    }
    munmap(team->scratch, AE_SCRATCH * (size_t)team->nthreads);
    free(team);
}
