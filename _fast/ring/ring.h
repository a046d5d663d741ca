/* A broadcast ring in shared memory: one writer, up to RING_MAX_READERS readers, each sees every record.
 *
 * Segment: one header (struct ring_shared, padded to whole pages), then `capacity` bytes of records,
 * a power of two. Positions count bytes since the start and never wrap; a record is
 *     u32 length, u32 kind, `length` bytes, padding to 8
 * Each process maps the records twice, back to back, so a record that crosses the end is contiguous
 * in memory and needs no wrap marker.
 *
 * Publishing: the writer stores the record, then `head` with release; a reader loads `head` with
 * acquire, copies, then stores its `tail` with release; the writer never passes the slowest tail.
 *
 * Sleeping: a sleeper stores its flag, fences, looks once more, then sleeps; its waker stores the
 * position, fences, then looks at the flag. The two sequentially consistent fences forbid that both
 * miss the other, on any memory model, so no wake-up is ever lost. The flag is the futex word itself:
 * a waker clears it before it wakes, so a sleeper that comes late does not fall asleep.
 */
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RING_MAGIC 0x31676e6972656161ull /* "aaering1" */
#define RING_MAX_READERS 64
#define RING_MAX_CAPACITY (1ull << 31)
#define RING_LINE 64
#define RING_FOREVER INT64_MAX

/* What a sleeper wants done to it. */
enum { RING_AWAKE = 0, RING_FUTEX = 1, RING_EVENTFD = 2 };

struct ring_reader_line {
    _Alignas(RING_LINE) uint64_t tail; /* bytes this reader is done with */
    uint32_t sleep;                    /* RING_AWAKE, RING_FUTEX or RING_EVENTFD */
};

struct ring_shared {
    uint64_t magic, capacity;
    uint32_t num_readers;
    _Alignas(RING_LINE) uint64_t head;  /* bytes published */
    _Alignas(RING_LINE) uint32_t sleep; /* the writer waits for space: RING_AWAKE or RING_FUTEX */
    struct ring_reader_line reader[RING_MAX_READERS];
};

struct ring_map {
    struct ring_shared *shared; /* NULL when closed */
    char *records;              /* 2 * capacity bytes */
    size_t size;                /* of the whole mapping */
    uint64_t capacity;
};

struct ring_writer {
    struct ring_map map;
    uint64_t head;
    uint64_t floor;                 /* the slowest tail, as last seen */
    int eventfd[RING_MAX_READERS];  /* -1 where none */
};

struct ring_reader {
    struct ring_map map;
    struct ring_reader_line *line;
    uint64_t tail;
};

struct ring_record {
    uint32_t length, kind;
    char data[];
};

static inline void ring_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static inline int64_t ring_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static inline size_t ring_header_size(void) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (sizeof(struct ring_shared) + page - 1) / page * page;
}

/* Bytes a record of n data bytes takes. */
static inline uint64_t ring_footprint(uint64_t n) {
    return sizeof(struct ring_record) + ((n + 7) & ~7ull);
}

/* ---- making, mapping ---- */

/* Returns a descriptor or -errno. The segment has no name, mode 0600, and can never shrink under a
 * process that has it mapped. */
static int ring_create(uint64_t capacity, uint32_t num_readers) {
    size_t header = ring_header_size();
    int fd = memfd_create("asyncengine-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return -errno;
    struct ring_shared *s = MAP_FAILED;
    if (fchmod(fd, 0600) == 0 && ftruncate(fd, (off_t)(header + capacity)) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        s = mmap(NULL, header, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (s == MAP_FAILED) {
        int error = errno;
        close(fd);
        return -error;
    }
    s->capacity = capacity;
    s->num_readers = num_readers;
    s->magic = RING_MAGIC;
    munmap(s, header);
    return fd;
}

/* Returns 0 or -errno; -EBADMSG where fd is not a ring. */
static int ring_attach(struct ring_map *m, int fd) {
    size_t header = ring_header_size();
    struct stat st;
    struct ring_shared about;
    if (fstat(fd, &st) < 0) return -errno;
    ssize_t n = pread(fd, &about, sizeof about, 0);
    if (n < 0) return -errno;
    if ((size_t)n < sizeof about || about.magic != RING_MAGIC || about.num_readers < 1 ||
        about.num_readers > RING_MAX_READERS || about.capacity > RING_MAX_CAPACITY ||
        (about.capacity & (about.capacity - 1)) || (uint64_t)st.st_size != header + about.capacity)
        return -EBADMSG;
    size_t capacity = about.capacity, size = header + 2 * capacity;
    char *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return -errno;
    const int rw = PROT_READ | PROT_WRITE, fixed = MAP_SHARED | MAP_FIXED;
    if (mmap(base, header + capacity, rw, fixed, fd, 0) == MAP_FAILED ||
        mmap(base + header + capacity, capacity, rw, fixed, fd, (off_t)header) == MAP_FAILED) {
        int error = errno;
        munmap(base, size);
        return -error;
    }
    m->shared = (struct ring_shared *)base;
    m->records = base + header;
    m->size = size;
    m->capacity = capacity;
    return 0;
}

static void ring_detach(struct ring_map *m) {
    if (m->shared) munmap(m->shared, m->size);
    m->shared = NULL;
}

static inline struct ring_record *ring_at(const struct ring_map *m, uint64_t position) {
    return (struct ring_record *)(m->records + (position & (m->capacity - 1)));
}

/* ---- sleeping ---- */

/* Sleeps while *word is RING_FUTEX. Returns 0 (look again), -ETIMEDOUT or -EINTR. */
static int ring_sleep(uint32_t *word, int64_t deadline) {
    struct timespec at = {deadline / 1000000000, deadline % 1000000000};
    if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET, RING_FUTEX, deadline == RING_FOREVER ? NULL : &at,
                NULL, FUTEX_BITSET_MATCH_ANY) == 0 || errno == EAGAIN)
        return 0;
    return -errno;
}

static inline void ring_wake(uint32_t *word, int eventfd) {
    switch (__atomic_exchange_n(word, RING_AWAKE, __ATOMIC_SEQ_CST)) {
    case RING_FUTEX:
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
        break;
    case RING_EVENTFD: {
        uint64_t one = 1;
        ssize_t n = write(eventfd, &one, sizeof one); /* EAGAIN: the counter is full, thus readable */
        (void)n;
    }
    }
}

/* ---- the writer ---- */

/* Takes up writing where the ring stands. Returns 0 or -errno, as ring_attach. */
static int ring_open_writer(struct ring_writer *w, int fd) {
    int rc = ring_attach(&w->map, fd);
    if (rc < 0) return rc;
    w->head = w->map.shared->head;
    w->floor = w->head - w->map.capacity; /* as if full: the first write looks at the tails */
    for (int i = 0; i < RING_MAX_READERS; i++) w->eventfd[i] = -1;
    return 0;
}

static int ring_has_space(struct ring_writer *w, uint64_t need) {
    if (w->head + need - w->floor <= w->map.capacity) return 1;
    struct ring_shared *s = w->map.shared;
    uint64_t floor = w->head;
    for (uint32_t i = 0; i < s->num_readers; i++) {
        uint64_t tail = __atomic_load_n(&s->reader[i].tail, __ATOMIC_ACQUIRE);
        if (tail < floor) floor = tail;
    }
    w->floor = floor;
    return w->head + need - floor <= w->map.capacity;
}

/* Appends one record made of two parts. Returns 0 where a reader has not made room yet. */
static int ring_put(struct ring_writer *w, uint32_t kind, const void *a, size_t na, const void *b,
                    size_t nb) {
    uint64_t need = ring_footprint(na + nb);
    if (!ring_has_space(w, need)) return 0;
    struct ring_record *r = ring_at(&w->map, w->head);
    r->length = (uint32_t)(na + nb);
    r->kind = kind;
    memcpy(r->data, a, na);
    if (nb) memcpy(r->data + na, b, nb);
    w->head += need;
    struct ring_shared *s = w->map.shared;
    __atomic_store_n(&s->head, w->head, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < s->num_readers; i++)
        if (__atomic_load_n(&s->reader[i].sleep, __ATOMIC_RELAXED) != RING_AWAKE)
            ring_wake(&s->reader[i].sleep, w->eventfd[i]);
    return 1;
}

/* Waits until a record of `need` bytes fits. Returns 0, -ETIMEDOUT or -EINTR. */
static int ring_wait_space(struct ring_writer *w, uint64_t need, int64_t deadline) {
    uint32_t *word = &w->map.shared->sleep;
    int rc = 0;
    while (!ring_has_space(w, need) && rc == 0) {
        __atomic_store_n(word, RING_FUTEX, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (!ring_has_space(w, need)) rc = ring_sleep(word, deadline);
        __atomic_store_n(word, RING_AWAKE, __ATOMIC_RELAXED);
    }
    return ring_has_space(w, need) ? 0 : rc;
}

/* ---- a reader ---- */

/* Returns 0 or -errno, as ring_attach; -ERANGE where the ring has no such reader. */
static int ring_open_reader(struct ring_reader *r, int fd, uint32_t index) {
    int rc = ring_attach(&r->map, fd);
    if (rc < 0) return rc;
    if (index >= r->map.shared->num_readers) {
        ring_detach(&r->map);
        return -ERANGE;
    }
    r->line = &r->map.shared->reader[index];
    r->tail = r->line->tail;
    return 0;
}

static inline int ring_has_record(struct ring_reader *r) {
    return __atomic_load_n(&r->map.shared->head, __ATOMIC_ACQUIRE) != r->tail;
}

/* Gives the space of the record at the tail back. */
static void ring_advance(struct ring_reader *r) {
    struct ring_shared *s = r->map.shared;
    r->tail += ring_footprint(ring_at(&r->map, r->tail)->length);
    __atomic_store_n(&r->line->tail, r->tail, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&s->sleep, __ATOMIC_RELAXED) != RING_AWAKE) ring_wake(&s->sleep, -1);
}

/* Marks the reader asleep in the given way. Returns 1 and unmarks it where a record is there already. */
static int ring_arm(struct ring_reader *r, uint32_t how) {
    __atomic_store_n(&r->line->sleep, how, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!ring_has_record(r)) return 0;
    __atomic_store_n(&r->line->sleep, RING_AWAKE, __ATOMIC_RELAXED);
    return 1;
}

/* Waits for a record: spins for spin_ns, then sleeps. Returns 0, -ETIMEDOUT or -EINTR. */
static int ring_wait_record(struct ring_reader *r, int64_t spin_ns, int64_t deadline) {
    if (spin_ns > 0)
        for (int64_t now = ring_now(), end = now + spin_ns; now < end && now < deadline; now = ring_now())
            for (int i = 0; i < 16; i++) {
                if (ring_has_record(r)) return 0;
                ring_pause();
            }
    int rc = 0;
    while (!ring_has_record(r) && rc == 0) {
        if (ring_arm(r, RING_FUTEX)) break;
        rc = ring_sleep(&r->line->sleep, deadline);
        __atomic_store_n(&r->line->sleep, RING_AWAKE, __ATOMIC_RELAXED);
    }
    return ring_has_record(r) ? 0 : rc;
}
