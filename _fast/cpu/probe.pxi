# Measures the machine: peaks that a step can be held against.

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec


cdef extern from "cpu/peak.h" nogil:
    enum:
        AE_PEAK_READ, AE_PEAK_F32, AE_PEAK_BF16, AE_PEAK_INT8, AE_NUM_PEAKS, AE_PEAK_STRIDE

    ctypedef struct ae_peak:
        int kind
        int64_t repeats
        char *data
        int64_t bytes
        double *done


cdef extern from *:
    """
    #include "cpu/kernels.h"

    typedef struct ae_peak_job {
        const ae_kernels *kernels;
        const ae_peak *peak;
    } ae_peak_job;

    static void ae_peak_run(void *arg, const ae_thread *thread) {
        const ae_peak_job *job = arg;
        job->kernels->peak(job->peak, thread);
    }
    """
    ctypedef struct ae_peak_job:
        const ae_kernels *kernels
        const ae_peak *peak

    void ae_peak_run(void *arg, const ae_thread *thread) noexcept nogil


cdef double _now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + 1e-9 * t.tv_nsec


def peaks(Team team not None, Py_ssize_t read_bytes=256 << 20, int64_t repeats=1 << 17, int tries=20):
    """The best of `tries` by the whole team at once, at its level, in units per second.

    Returns {"read": bytes, "f32": operations, "bf16": operations, "int8": operations}; a multiply-add is two
    operations. Takes about a second: many short tries, of which the least disturbed counts. `read_bytes` of
    memory, at least 4096, should exceed the last cache several times.
    """
    if read_bytes < 4096 or repeats < 1 or tries < 1:
        raise ValueError("read_bytes must be at least 4096, repeats and tries at least 1")
    cdef Buffer memory = Buffer(read_bytes // 4096 * 4096)
    memset(memory._data, 0, memory.nbytes)  # pages never written to would all be the same one
    cdef Buffer done = Buffer(team.num_threads * AE_PEAK_STRIDE * sizeof(double))
    cdef double *counts = <double *>done._data
    cdef ae_peak peak
    cdef ae_peak_job job
    cdef double begin, seconds, total, best
    cdef int failed = 0, i, kind
    peak.repeats = repeats
    peak.data = <char *>memory._data
    peak.bytes = memory.nbytes
    peak.done = counts
    job.kernels = team._kernels
    job.peak = &peak
    found = []
    for kind in range(AE_NUM_PEAKS):
        peak.kind = kind
        best = 0
        for _ in range(tries):
            with nogil:
                begin = _now()
                failed = ae_team_run(team._team, ae_peak_run, &job)
                seconds = _now() - begin
            if failed:
                raise RuntimeError(_FORKED)
            total = 0
            for i in range(team.num_threads):
                total += counts[i * AE_PEAK_STRIDE]
            best = max(best, total / seconds)
        found.append(best)
    return dict(zip(("read", "f32", "bf16", "int8"), found, strict=True))
