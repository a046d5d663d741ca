# Sampling, and the size of attention's workspace.

cdef extern from "cpu/attention.h" nogil:
    enum:
        MAX_DIM

    int64_t ae_kv_block_bytes(int type, int64_t kv_heads, int64_t block, int64_t dim)
    int64_t attention_workspace_bytes(
        int threads, int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t max_context
    )


cdef extern from "cpu/head.h" nogil:
    ctypedef struct ae_best:
        pass


cdef extern from "cpu/sample.h" nogil:
    ctypedef struct ae_sample:
        int64_t rows, vocab
        const float *logits
        const int32_t *head_k
        const ae_best *best
        const float *temperature
        const int32_t *top_k
        const float *top_p
        const float *min_p
        const float *presence
        const float *frequency
        const float *repetition
        const uint64_t *seed
        const int64_t *position
        const uint64_t *counts
        const uint64_t *prompt_mask
        const int32_t *banned_start
        const int32_t *banned
        const int32_t *num_logprobs
        int64_t max_logprobs
        char *workspace
        int32_t *tokens
        float *logprob
        int32_t *rank
        int32_t *top_ids
        float *top_logprobs

    size_t ae_sample_workspace(int num_threads, int64_t vocab)
    int ae_sample_run(ae_team *team, const ae_kernels *kernels, const ae_sample *args)


cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)


def attention_workspace(
    int num_threads, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t max_context
):
    """Bytes of the workspace of ATTENTION (p7, n7) that keep every thread busy in decode.

    Less is slower where few sequences have long contexts, never wrong. ValueError for heads that ATTENTION
    does not take.
    """
    if num_threads < 1 or kv_heads < 1 or q_heads < 1 or q_heads % kv_heads or max_context < 0:
        raise ValueError(
            f"no attention of {q_heads} heads over {kv_heads} KV heads, {max_context} positions"
            f" and {num_threads} threads"
        )
    if not 1 <= head_dim <= MAX_DIM:
        raise ValueError(f"head_dim must be between 1 and {MAX_DIM}, got {head_dim}")
    return attention_workspace_bytes(num_threads, q_heads, kv_heads, head_dim, max_context)


_KV_TYPES = {**_TYPES, "I8": AE_I8}


def kv_block_bytes(str dtype, int64_t kv_heads, int64_t block_size, int64_t head_dim):
    """Bytes of the keys, or of the values, of one block of one layer; `dtype` is F32, BF16, F16 or I8.

    What lies where is in `cpu/attention.h`. ValueError for a type or sizes that ATTENTION does not take.
    """
    cdef int type = _lookup(_KV_TYPES, dtype, "KV cache type")
    if kv_heads < 1 or block_size < 1 or not 1 <= head_dim <= MAX_DIM:
        raise ValueError(f"no blocks of {block_size} positions of {kv_heads} KV heads of size {head_dim}")
    return ae_kv_block_bytes(type, kv_heads, block_size, head_dim)


cdef int _enough(Py_ssize_t have, int64_t rows, str name) except -1:
    if have < rows:
        raise ValueError(f"{name} has {have} rows where {rows} are needed")
    return 0


# The first of `rows` elements; NULL for an array that was not given.
cdef const float *_floats(const float[::1] array, int64_t rows, str name) except? NULL:
    if array is None:
        return NULL
    _enough(array.shape[0], rows, name)
    return &array[0]


cdef const int32_t *_ints(const int32_t[::1] array, int64_t rows, str name) except? NULL:
    if array is None:
        return NULL
    _enough(array.shape[0], rows, name)
    return &array[0]


cdef const uint64_t *_words(const uint64_t[::1] array, int64_t rows, str name) except? NULL:
    if array is None:
        return NULL
    _enough(array.shape[0], rows, name)
    return &array[0]


def head_bytes(int num_threads, int64_t num_samples):
    """Bytes of the results of HEAD (p4) for steps of up to `num_samples` rows."""
    if num_threads < 1 or num_samples < 0:
        raise ValueError(f"no head of {num_samples} rows on {num_threads} threads")
    return num_threads * num_samples * <int64_t>sizeof(ae_best)


def sample_workspace(int num_threads, int64_t vocab):
    """Bytes of the workspace of `sample`."""
    if num_threads < 1 or vocab < 1:
        raise ValueError(f"no sampling of {vocab} ids on {num_threads} threads")
    return <int64_t>ae_sample_workspace(num_threads, vocab)


def count_tokens(const uint64_t[::1] counts not None, const int32_t[::1] tokens not None, int32_t vocab):
    """Adds 1 to element `tokens[i]` of the int32 [vocab] array at address `counts[i]`, for every i in turn.

    Addresses of 0 and tokens outside the vocabulary are passed over.
    """
    cdef Py_ssize_t i
    _enough(counts.shape[0], tokens.shape[0], "counts")
    for i in range(tokens.shape[0]):
        if counts[i] and 0 <= tokens[i] < vocab:
            (<int32_t *><uintptr_t>counts[i])[tokens[i]] += 1


def sample(
    Team team not None,
    uintptr_t logits,
    int64_t vocab,
    int32_t[::1] tokens not None,
    *,
    const int32_t[::1] head_k=None,
    uintptr_t best=0,
    uintptr_t workspace=0,
    const float[::1] temperature=None,
    const int32_t[::1] top_k=None,
    const float[::1] top_p=None,
    const float[::1] min_p=None,
    const float[::1] presence=None,
    const float[::1] frequency=None,
    const float[::1] repetition=None,
    const uint64_t[::1] seed=None,
    const int64_t[::1] position=None,
    const uint64_t[::1] counts=None,
    const uint64_t[::1] prompt_mask=None,
    const int32_t[::1] banned_start=None,
    const int32_t[::1] banned=None,
    const int32_t[::1] num_logprobs=None,
    float[::1] logprob=None,
    int32_t[::1] rank=None,
    int32_t[:, ::1] top_ids=None,
    float[:, ::1] top_logprobs=None,
):
    """Draws a token into `tokens` [S] for every row of the float32 [S, vocab] matrix at address `logits`.

    What each array means, what its absence means, and the distribution that is drawn from are in
    `cpu/sample.h`; all have S rows (`banned_start` S + 1). -1 marks a row without a usable logit.
    `num_logprobs` needs the four arrays after it. `head_k` and `best`, the address of HEAD's results, tell
    of rows that HEAD has reduced. `workspace` is the address of `sample_workspace()` bytes, aligned to 64;
    0 has them allocated for this call. Runs on the whole team without the GIL; the logits are not modified.
    ValueError for arrays that do not fit together.
    """
    cdef int64_t rows = tokens.shape[0], i
    cdef ae_sample args
    cdef int failed
    if logits == 0 or not 1 <= vocab < 1 << 31:
        raise ValueError(f"no logits of {vocab} ids at address {logits}")
    if rows == 0:
        return
    memset(&args, 0, sizeof(args))
    args.rows = rows
    args.vocab = vocab
    args.logits = <const float *>logits
    args.tokens = &tokens[0]
    if (head_k is None) != (best == 0):
        raise ValueError("head_k and best need each other")
    args.head_k = _ints(head_k, rows, "head_k")
    args.best = <const ae_best *>best
    args.temperature = _floats(temperature, rows, "temperature")
    args.top_k = _ints(top_k, rows, "top_k")
    args.top_p = _floats(top_p, rows, "top_p")
    args.min_p = _floats(min_p, rows, "min_p")
    args.presence = _floats(presence, rows, "presence")
    args.frequency = _floats(frequency, rows, "frequency")
    args.repetition = _floats(repetition, rows, "repetition")
    args.seed = _words(seed, rows, "seed")
    args.counts = _words(counts, rows, "counts")
    args.prompt_mask = _words(prompt_mask, rows, "prompt_mask")
    if position is not None:
        _enough(position.shape[0], rows, "position")
        args.position = &position[0]
    if banned_start is not None:
        if banned is None:
            raise ValueError("banned_start needs banned")
        args.banned_start = _ints(banned_start, rows + 1, "banned_start")
        for i in range(rows):
            if not 0 <= banned_start[i] <= banned_start[i + 1] <= banned.shape[0]:
                raise ValueError(f"banned_start does not ascend within banned at row {i}")
        args.banned = _ints(banned, 0, "banned")
    if num_logprobs is not None:
        if logprob is None or rank is None or top_ids is None or top_logprobs is None:
            raise ValueError("num_logprobs needs logprob, rank, top_ids and top_logprobs")
        _enough(logprob.shape[0], rows, "logprob")
        _enough(rank.shape[0], rows, "rank")
        _enough(top_ids.shape[0], rows, "top_ids")
        _enough(top_logprobs.shape[0], rows, "top_logprobs")
        if top_logprobs.shape[1] != top_ids.shape[1]:
            raise ValueError("top_ids and top_logprobs must have the same width")
        args.num_logprobs = _ints(num_logprobs, rows, "num_logprobs")
        args.max_logprobs = top_ids.shape[1]
        for i in range(rows):
            if num_logprobs[i] > args.max_logprobs:
                raise ValueError(
                    f"row {i} wants {num_logprobs[i]} logprobs; there is room for {top_ids.shape[1]}"
                )
        args.logprob = &logprob[0]
        args.rank = &rank[0]
        args.top_ids = &top_ids[0, 0]
        args.top_logprobs = &top_logprobs[0, 0]
    cdef void *own = NULL
    if workspace == 0:
        own = aligned_alloc(64, ae_sample_workspace(team.num_threads, vocab))
        if own == NULL:
            raise MemoryError
    args.workspace = <char *>own if workspace == 0 else <char *>workspace
    with nogil:
        failed = ae_sample_run(team._team, team._kernels, &args)
        free(own)
    if failed:
        raise RuntimeError(_FORKED)


@cython.final
cdef class HeadDraws:
    """What HEAD is to keep of rows, and what is drawn from that, by parameters of the rows' slots: arrays
    [slots], held, not copied.

    `head_k` and `head_temperature` are those of a row, which keeps all its logits while its token's position
    is below `whole_below`. One thread draws: of so few candidates a row takes less time than waking another.
    `workspace` is that of `sample`; the caller keeps it alive.
    """

    cdef Team _team
    cdef char *_workspace
    cdef int64_t _vocab
    cdef const int32_t[::1] _head_k
    cdef const float[::1] _head_temperature
    cdef const int32_t[::1] _whole_below
    cdef const float[::1] _temperature
    cdef const int32_t[::1] _top_k
    cdef const float[::1] _top_p
    cdef const float[::1] _min_p
    cdef const uint64_t[::1] _seed

    def __cinit__(
        self,
        Team team not None,
        int64_t vocab,
        uintptr_t workspace,
        *,
        const int32_t[::1] head_k not None,
        const float[::1] head_temperature not None,
        const int32_t[::1] whole_below not None,
        const float[::1] temperature not None,
        const int32_t[::1] top_k not None,
        const float[::1] top_p not None,
        const float[::1] min_p not None,
        const uint64_t[::1] seed not None,
    ):
        self._team = Team(1, team.level)
        self._vocab = vocab
        self._workspace = <char *>workspace
        self._head_k, self._head_temperature, self._whole_below = head_k, head_temperature, whole_below
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._min_p, self._seed = min_p, seed
        _enough(head_temperature.shape[0], head_k.shape[0], "head_temperature")
        _enough(whole_below.shape[0], head_k.shape[0], "whole_below")
        _enough(temperature.shape[0], head_k.shape[0], "temperature")
        _enough(top_k.shape[0], head_k.shape[0], "top_k")
        _enough(top_p.shape[0], head_k.shape[0], "top_p")
        _enough(min_p.shape[0], head_k.shape[0], "min_p")
        _enough(seed.shape[0], head_k.shape[0], "seed")

    cdef int _check(self, const int32_t[::1] slots, const int32_t[::1] positions) except -1:
        cdef int64_t i
        _enough(positions.shape[0], slots.shape[0], "positions")
        for i in range(slots.shape[0]):
            if not 0 <= slots[i] < self._head_k.shape[0]:
                raise ValueError(f"row {i} is of slot {slots[i]}, of {self._head_k.shape[0]}")
        return 0

    def modes(
        self,
        const int32_t[::1] slots not None,
        const int32_t[::1] positions not None,
        int32_t[::1] k not None,
        float[::1] temperature not None,
    ):
        """Writes what HEAD is to keep of the rows of `slots` [S] whose tokens get `positions` [S]: the first S
        of `k` and of `temperature` (see `Step`). ValueError for arrays that do not fit together."""
        cdef int64_t i
        cdef int32_t slot
        self._check(slots, positions)
        _enough(k.shape[0], slots.shape[0], "k")
        _enough(temperature.shape[0], slots.shape[0], "temperature")
        for i in range(slots.shape[0]):
            slot = slots[i]
            k[i] = -1 if positions[i] < self._whole_below[slot] else self._head_k[slot]
            temperature[i] = self._head_temperature[slot]

    def draw(
        self,
        uintptr_t best,
        const int32_t[::1] best_k not None,
        const int32_t[::1] slots not None,
        const int32_t[::1] positions not None,
        int32_t[::1] tokens not None,
    ):
        """Draws `tokens` [S] from `best`, the address of HEAD's results, as `sample` would: how many of them
        failed. -1, and nothing is drawn, where `best_k` tells that a row was not reduced.

        `positions` [S] are those of the drawn tokens. ValueError for arrays that do not fit together.
        """
        cdef int64_t rows = tokens.shape[0], i
        cdef int32_t slot
        cdef int failed = 0, failures = 0
        cdef ae_sample args
        cdef float temperature, top_p, min_p
        cdef int32_t top_k
        cdef uint64_t seed
        cdef int64_t position
        _enough(best_k.shape[0], rows, "best_k")
        _enough(slots.shape[0], rows, "slots")
        self._check(slots, positions)
        for i in range(rows):
            if best_k[i] < 1:
                return -1
        memset(&args, 0, sizeof(args))
        args.rows = 1
        args.vocab = self._vocab
        args.workspace = self._workspace
        args.temperature, args.top_k, args.top_p = &temperature, &top_k, &top_p
        args.min_p, args.seed, args.position = &min_p, &seed, &position
        for i in range(rows):
            slot = slots[i]
            temperature, top_k, top_p = self._temperature[slot], self._top_k[slot], self._top_p[slot]
            min_p, seed, position = self._min_p[slot], self._seed[slot], positions[i]
            args.head_k = &best_k[i]
            args.best = <const ae_best *>best + i
            args.tokens = &tokens[i]
            failed |= ae_sample_run(self._team._team, self._team._kernels, &args)
            failures += tokens[i] < 0
        if failed:
            raise RuntimeError(_FORKED)
        return failures
