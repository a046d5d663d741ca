#define _GNU_SOURCE

#include "comm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "futex.h"

/* Below this, waking helpers costs more than copying alone. */
#define SMALL_BYTES 32768

typedef struct shared_header {
    ae_meeting meeting;
    _Alignas(64) atomic_llong world, region_bytes; /* what the first rank to come said */
} shared_header;

/* Heads a region in ALL_GATHER: where the rank's columns belong. */
typedef struct slice {
    _Alignas(64) int64_t first, width;
} slice;

struct ae_comm {
    shared_header *shared;
    size_t mapped, region_bytes, stride;
    int rank, world, turn, cpus;
};

static size_t region_stride(size_t region_bytes) {
    return sizeof(slice) + (region_bytes + 63) / 64 * 64;
}

size_t ae_comm_bytes(int world, size_t region_bytes) {
    return sizeof(shared_header) + 2 * (size_t)world * region_stride(region_bytes);
}

static int agree(atomic_llong *field, long long value) {
    long long found = 0;
    return atomic_compare_exchange_strong(field, &found, value) || found == value;
}

ae_comm *ae_comm_open(int fd, int rank, int world, size_t region_bytes) {
    struct stat st;
    size_t size = ae_comm_bytes(world, region_bytes);
    if (fstat(fd, &st)) return NULL;
    if ((size_t)st.st_size < size) {
        errno = EINVAL;
        return NULL;
    }
    ae_comm *comm = malloc(sizeof *comm);
    if (comm == NULL) return NULL;
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        free(comm);
        return NULL;
    }
    *comm = (ae_comm){map, size, region_bytes, region_stride(region_bytes), rank, world, 0, ae_num_cpus()};
    if (!agree(&comm->shared->world, world) || !agree(&comm->shared->region_bytes, (long long)region_bytes)) {
        ae_comm_close(comm);
        errno = EINVAL;
        return NULL;
    }
    return comm;
}

void ae_comm_close(ae_comm *comm) {
    munmap(comm->shared, comm->mapped);
    free(comm);
}

static slice *region(const ae_comm *comm, int rank) {
    return (slice *)((char *)(comm->shared + 1) + (2 * (size_t)rank + (size_t)comm->turn) * comm->stride);
}

static float *region_data(const ae_comm *comm, int rank) { return (float *)(region(comm, rank) + 1); }

/* The ranks meet. Spinning helps only while every thread of every rank has a CPU of its own. */
static void meet(ae_comm *comm, int threads) {
    ae_meeting *meeting = &comm->shared->meeting;
    unsigned generation;
    if (ae_meeting_arrive(meeting, comm->world, &generation))
        ae_meeting_open(meeting, 1);
    else
        ae_meeting_wait(meeting, generation, comm->cpus >= comm->world * threads, 1);
}

/* The first `helpers` threads of each rank take part; they meet, with their ranks in between. */
static void meet_all(ae_comm *comm, const ae_thread *thread, int helpers) {
    if (helpers > 1) ae_barrier(thread);
    if (thread->tid == 0) meet(comm, thread->nthreads);
    if (helpers > 1) ae_barrier(thread);
}

/* Ends a chunk: no thread of this rank still reads `turn`, and thread 0 may change it. */
static void take_turn(ae_comm *comm, const ae_thread *thread, int helpers) {
    if (helpers > 1) ae_barrier(thread);
    if (thread->tid == 0) comm->turn ^= 1;
    if (helpers > 1) ae_barrier(thread);
}

void ae_comm_broadcast(ae_comm *comm, int32_t *tokens, int64_t count) {
    int64_t room = (int64_t)(comm->region_bytes / sizeof *tokens);
    for (int64_t i = 0; i < count; i += room) {
        size_t bytes = (size_t)(count - i < room ? count - i : room) * sizeof *tokens;
        float *source = region_data(comm, 0);
        if (comm->rank == 0) memcpy(source, tokens + i, bytes);
        meet(comm, 1);
        if (comm->rank != 0) memcpy(tokens + i, source, bytes);
        comm->turn ^= 1;
    }
}

static void share_of(const ae_thread *thread, int helpers, int64_t total, int64_t *lo, int64_t *hi) {
    ae_thread part = *thread;
    part.nthreads = helpers;
    ae_share(&part, total, 16, lo, hi);
}

void ae_all_reduce(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    ae_comm *comm = op->p[1];
    float *x = op->p[0];
    int64_t total = ae_rows_of(op, step) * op->n[0], room = (int64_t)(comm->region_bytes / sizeof *x);
    int helpers = total * (int64_t)sizeof *x > SMALL_BYTES ? thread->nthreads : 1;
    if (thread->tid >= helpers) return;
    for (int64_t start = 0; start < total; start += room) {
        int64_t lo, hi, count = total - start < room ? total - start : room;
        share_of(thread, helpers, count, &lo, &hi);
        memcpy(region_data(comm, comm->rank) + lo, x + start + lo, (size_t)(hi - lo) * sizeof *x);
        meet_all(comm, thread, helpers);
        float *sum = x + start;
        memcpy(sum + lo, region_data(comm, 0) + lo, (size_t)(hi - lo) * sizeof *x);
        for (int r = 1; r < comm->world; r++) {
            const float *restrict part = region_data(comm, r);
            for (int64_t i = lo; i < hi; i++) sum[i] += part[i];
        }
        take_turn(comm, thread, helpers);
    }
}

/* Rows [row, row + rows), columns [col, col + cols) of every rank's slice, where they exist. The chunks
 * depend on the total width only, so that ranks with slices of different widths take the same turns. */
static void gather_chunk(const ae_op *op, const ae_thread *thread, int helpers, int64_t row, int64_t rows,
                         int64_t col, int64_t cols) {
    ae_comm *comm = op->p[2];
    float *out = op->p[0];
    const float *x = op->p[1];
    int64_t width = op->n[0], total = op->n[1], mine = width - col < cols ? width - col : cols, lo, hi;
    if (mine < 0) mine = 0;
    share_of(thread, helpers, rows, &lo, &hi);
    if (thread->tid == 0) *region(comm, comm->rank) = (slice){op->n[2] + col, mine};
    float *own = region_data(comm, comm->rank);
    for (int64_t r = lo; r < hi; r++)
        memcpy(own + r * mine, x + (row + r) * width + col, (size_t)mine * sizeof *x);
    meet_all(comm, thread, helpers);
    for (int k = 0; k < comm->world; k++) {
        const slice s = *region(comm, k);
        const float *part = region_data(comm, k);
        for (int64_t r = lo; r < hi; r++)
            memcpy(out + (row + r) * total + s.first, part + r * s.width, (size_t)s.width * sizeof *x);
    }
    take_turn(comm, thread, helpers);
}

void ae_all_gather(const ae_op *op, const ae_step *step, const ae_thread *thread) {
    ae_comm *comm = op->p[2];
    int64_t rows = ae_rows_of(op, step), total = op->n[1];
    int64_t room = (int64_t)(comm->region_bytes / sizeof(float));
    int64_t cols = total < room ? total : room, high = room / cols;
    int helpers = rows * total * (int64_t)sizeof(float) > SMALL_BYTES ? thread->nthreads : 1;
    if (thread->tid >= helpers) return;
    for (int64_t row = 0; row < rows; row += high)
        for (int64_t col = 0; col < total; col += cols)
            gather_chunk(op, thread, helpers, row, rows - row < high ? rows - row : high, col, cols);
}
