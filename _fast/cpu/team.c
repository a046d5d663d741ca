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
    ae_meeting meeting; /* its generation is what threads wait at between jobs, too */
    _Alignas(64) atomic_llong next; /* of ae_next; zeroed by whoever opens the meeting */
    /* Of the last job begun: in the upper half its number; in the lower one how many threads have come to it
     * besides the caller, or ALL where it was begun together. */
    _Alignas(64) atomic_ullong door;
    /* Of the op: how many run it, and where those of them begin who came last. Written before the meeting is
     * opened, by whoever opens it. */
    _Alignas(64) atomic_int present;
    int64_t place;
    atomic_uint over; /* the number of the last job that is done */
    int nthreads;
    int started; /* threads that exist, the caller included; nthreads unless creation failed */
    int spin;
    pid_t owner;
    ae_job job; /* NULL ends the threads */
    void *arg;
    char *scratch;
    pthread_mutex_t busy;
    member members[];
};

#define ALL UINT32_MAX
/* How long a job waits for threads that may be late. */
#define PATIENCE_NS 2000

static uint32_t number_of(unsigned long long door) { return (uint32_t)(door >> 32); }

/* Threads that have come to the job, the caller included. */
static int come(ae_team *team) {
    const uint32_t count = (uint32_t)atomic_load_explicit(&team->door, memory_order_acquire);
    return count == ALL ? team->nthreads : 1 + (int)count;
}

/* If all are there, each has its own part always; else they are numbered as they came. */
static void take_part(ae_thread *thread, int members) {
    thread->nthreads = members;
    thread->tid = members == thread->team->nthreads ? thread->index : thread->order;
}

/* Arrives. The last one of so many is told at once, with 1, and must open the meeting; the others when it is open. */
static int arrives_last(ae_team *team, int parties) {
    unsigned generation;
    if (ae_meeting_arrive(&team->meeting, parties, &generation)) return 1;
    ae_meeting_wait(&team->meeting, generation, team->spin, 0);
    return 0;
}

static void open_meeting(ae_team *team) {
    /* Not written where nobody took: the line may be another's. */
    if (atomic_load_explicit(&team->next, memory_order_relaxed))
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    ae_meeting_open(&team->meeting, 0);
}

void ae_barrier(const ae_thread *thread) {
    if (arrives_last(thread->team, thread->nthreads)) open_meeting(thread->team);
}

void ae_next_op(ae_thread *thread, int64_t next) {
    ae_team *team = thread->team;
    if (arrives_last(team, thread->nthreads)) {
        const int members = come(team);
        if (members != thread->nthreads) {
            team->place = next;
            atomic_store_explicit(&team->present, members, memory_order_release);
        }
        open_meeting(team);
    }
    take_part(thread, atomic_load_explicit(&team->present, memory_order_acquire));
}

/* The meeting at the end of a job. Afterwards nobody is let in. */
static void end_job(ae_team *team, uint32_t number) {
    if (!arrives_last(team, atomic_load_explicit(&team->present, memory_order_relaxed))) return;
    atomic_store_explicit(&team->over, number, memory_order_release);
    open_meeting(team);
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

/* Comes to the last job begun, and returns its number. */
static uint32_t come_to(ae_team *team, ae_thread *view) {
    unsigned long long door = atomic_load_explicit(&team->door, memory_order_acquire);
    do {
        view->order = (uint32_t)door == ALL ? view->index : (int)(uint32_t)door + 1;
    } while ((uint32_t)door != ALL && !atomic_compare_exchange_weak(&team->door, &door, door + 1));
    return number_of(door);
}

/* Waits until this thread is let in; 0 if the job has ended without it. */
static int is_let_in(ae_team *team, ae_thread *view, uint32_t number) {
    for (;;) {
        const unsigned generation = atomic_load_explicit(&team->meeting.generation, memory_order_acquire);
        /* In this order: the members of a later job are set after `over`. */
        const int members = atomic_load_explicit(&team->present, memory_order_acquire);
        if ((int32_t)(atomic_load_explicit(&team->over, memory_order_acquire) - number) >= 0) return 0;
        if (members > view->order) {
            take_part(view, members);
            return 1;
        }
        ae_meeting_wait(&team->meeting, generation, team->spin, 0);
    }
}

static void *thread_main(void *arg) {
    ae_thread *view = arg;
    ae_team *team = view->team;
    for (uint32_t seen = 0;;) {
        const unsigned generation = atomic_load_explicit(&team->meeting.generation, memory_order_acquire);
        if (number_of(atomic_load_explicit(&team->door, memory_order_acquire)) == seen) {
            ae_meeting_wait(&team->meeting, generation, team->spin, 0);
            continue;
        }
        seen = come_to(team, view);
        if (!is_let_in(team, view, seen)) continue;
        if (team->job == NULL) return NULL;
        view->first = team->place;
        team->job(team->arg, view);
        end_job(team, seen);
    }
}

/* On `members` threads from the beginning: all of them, or the caller alone, whom others join. */
static void run(ae_team *team, int members, ae_job job, void *arg) {
    ae_thread *caller = &team->members[0].view;
    const uint32_t number = number_of(atomic_load_explicit(&team->door, memory_order_relaxed)) + 1;
    team->job = job;
    team->arg = arg;
    team->place = 0;
    take_part(caller, members);
    atomic_store_explicit(&team->present, members, memory_order_release);
    const unsigned long long count = members == team->nthreads ? ALL : 0;
    atomic_store_explicit(&team->door, (unsigned long long)number << 32 | count, memory_order_release);
    ae_meeting_open(&team->meeting, 0);
    if (job == NULL) return;
    if (members < team->nthreads) {
        if (team->spin)
            for (const int64_t end = ae_now_ns() + PATIENCE_NS; come(team) < team->nthreads && ae_now_ns() < end;)
                ae_pause();
        ae_next_op(caller, 0);
    }
    job(arg, caller);
    end_job(team, number);
}

static int run_in_turn(ae_team *team, int members, ae_job job, void *arg) {
    if (getpid() != team->owner) return -1;
    pthread_mutex_lock(&team->busy);
    run(team, members, job, arg);
    pthread_mutex_unlock(&team->busy);
    return 0;
}

int ae_team_run(ae_team *team, ae_job job, void *arg) { return run_in_turn(team, team->nthreads, job, arg); }

int ae_team_run_short(ae_team *team, ae_job job, void *arg) { return run_in_turn(team, 1, job, arg); }

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
        team->members[i].view = (ae_thread){.index = i, .team = team, .scratch = own};
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
        run(team, team->nthreads, NULL, NULL);
        for (int i = 1; i < team->started; i++) pthread_join(team->members[i].pthread, NULL);
    }
    munmap(team->scratch, AE_SCRATCH * (size_t)team->nthreads);
    free(team);
}
