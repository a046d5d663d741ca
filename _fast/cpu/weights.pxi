# Checkpoint tensors into the forms that ops read.

cdef extern from "cpu/pack.h" nogil:
    ctypedef struct ae_source:
        const char *data
        int type
        const ae_codes *codes
        int64_t rows, cols, col_start, col_stop, row_start

    ctypedef struct ae_target:
        char *data
        int type
        int minimum
        int64_t group, row_offset, panel_stride, panel_offset

    ctypedef struct ae_coding:
        int bits, zero

    enum:
        AE_PANEL
        AE_SRC_F32, AE_SRC_BF16, AE_SRC_F16
        AE_SRC_Q8_0, AE_SRC_Q4_0, AE_SRC_Q4_1, AE_SRC_Q5_0, AE_SRC_Q5_1, AE_SRC_Q4_K, AE_SRC_Q5_K, AE_SRC_Q6_K

    int ae_source_block(int type)
    int64_t ae_source_bytes(int type, int64_t count)
    ae_coding ae_source_coding(int type)
    int64_t ae_packed_bytes(int64_t n, int64_t k, int type, int64_t group, int minimum)
    int ae_pack(ae_team *team, const ae_kernels *kernels, const ae_source *source, const ae_target *target)
    int ae_convert(ae_team *team, const ae_source *source, const ae_target *target)


cdef extern from "cpu/compact.h" nogil:
    int64_t ae_compact_most_bytes(int64_t panels, int64_t k)
    const char *ae_compact_at(const char *weight, int64_t p)
    int64_t ae_compact(
        ae_team *team,
        const char *packed,
        int64_t k,
        char *weight,
        int64_t panels,
        int64_t first,
        int64_t count,
    )


cdef extern from "cpu/quantized.h" nogil:
    enum:
        AE_WHOLE, AE_WHOLE16, AE_ROUNDED, AE_COMPACT
    int64_t AE_MOST_WHOLE, AE_MOST_WHOLE16
    int64_t ae_row8_bytes(int64_t k, int64_t group)


cdef extern from "cpu/rotate.h" nogil:
    int64_t ae_rotation_norm(int64_t k)


PANEL = AE_PANEL
WHOLE = AE_WHOLE
WHOLE16 = AE_WHOLE16
ROUNDED = AE_ROUNDED
COMPACT = AE_COMPACT
MOST_WHOLE = AE_MOST_WHOLE
MOST_WHOLE16 = AE_MOST_WHOLE16
_SOURCE_TYPES = {
    "F32": AE_SRC_F32,
    "BF16": AE_SRC_BF16,
    "F16": AE_SRC_F16,
    "Q8_0": AE_SRC_Q8_0,
    "Q4_0": AE_SRC_Q4_0,
    "Q4_1": AE_SRC_Q4_1,
    "Q5_0": AE_SRC_Q5_0,
    "Q5_1": AE_SRC_Q5_1,
    "Q4_K": AE_SRC_Q4_K,
    "Q5_K": AE_SRC_Q5_K,
    "Q6_K": AE_SRC_Q6_K,
}


def source_bytes(str src_dtype not None, int64_t count):
    """Bytes of `count` stored values; ValueError unless `count` is whole blocks."""
    cdef int type = _lookup(_SOURCE_TYPES, src_dtype, "source type")
    if count < 0 or count % ae_source_block(type):
        raise ValueError(f"{count} values are not whole {src_dtype} blocks of {ae_source_block(type)}")
    return ae_source_bytes(type, count)


def source_format(str src_dtype not None):
    """(bits, has minimum) of the quantized weight, in groups of 32, that keeps what is stored; or None.

    Scales and codes stay as they are; those of Q6_K, whose groups are shorter, are rounded to 8 bits anew.
    """
    if src_dtype not in _SOURCE_TYPES:
        return None
    cdef int type = _SOURCE_TYPES[src_dtype]
    cdef ae_coding coding = ae_source_coding(type)
    if type == AE_SRC_Q6_K:
        return 8, False
    return (4 if coding.bits == 4 else 8, coding.zero < 0) if coding.bits else None


cdef int _check_group(int64_t group, int64_t k, str what) except -1:
    if group not in (32, 64, 128, AE_WHOLE, AE_WHOLE16):
        raise ValueError(f"groups of {what} are 32, 64 or 128 columns, WHOLE or WHOLE16, got {group}")
    cdef int64_t most = AE_MOST_WHOLE16 if group == AE_WHOLE16 else AE_MOST_WHOLE
    if group < 0 and k > most:
        raise ValueError(f"{what} in whole rows have at most {most} columns, got {k}")
    return 0


def quantized_row_bytes(int64_t k, int64_t group):
    """Bytes of a quantized row of `k` activations, or of a rounded one (group ROUNDED)."""
    if k < 0:
        raise ValueError(f"the width must not be negative, got {k}")
    if group != AE_ROUNDED:
        _check_group(group, k, "quantized rows")
    return ae_row8_bytes(k, group)


def rotation_norm(int64_t k):
    """By how much products of two rotated rows of `k` exceed those of the rows (cpu/rotate.h)."""
    if k < 1:
        raise ValueError(f"the width must be positive, got {k}")
    return ae_rotation_norm(k)


# The `enum ae_dtype` of a packed weight, after checking that its groups suit it.
cdef int _weight_type(str dtype, int64_t k, int64_t group, bint minimum) except -1:
    cdef int type = _lookup(_WEIGHT_TYPES, dtype, "weight type")
    if type == AE_Q16 or type == AE_Q8 or type == AE_Q4:
        _check_group(group, k, f"{dtype} weights")
        if group < 0 and minimum:
            raise ValueError("weights in whole rows have no minima")
        if (type == AE_Q16) != (group == AE_WHOLE16):
            raise ValueError(f"Q16 weights, and no others, are in WHOLE16 rows, got {dtype} in {group}")
    elif group or minimum:
        raise ValueError(f"{dtype} weights have no groups")
    return type


def packed_bytes(int64_t n, int64_t k, str dtype not None, int64_t group=0, bint minimum=False):
    """Bytes of a packed [n, k] weight of type `dtype`: F32, BF16, F16, or Q16, Q8 or Q4 in groups. Of BF16 in
    group COMPACT, the most that it can take; `compact` tells how many it does."""
    if n < 0 or k < 0:
        raise ValueError(f"the shape must not be negative, got [{n}, {k}]")
    if group == AE_COMPACT and dtype == "BF16":
        return ae_compact_most_bytes((n + AE_PANEL - 1) // AE_PANEL, k)
    return ae_packed_bytes(n, k, _weight_type(dtype, k, group, minimum), group, minimum)


# Fills `source`, which lives no longer than what is returned.
cdef object _source(
    ae_source *source,
    str src_dtype,
    object src,
    int64_t rows,
    int64_t cols,
    int64_t row_offset,
    int64_t row_start,
    int64_t col_start,
    object col_stop,
):
    memset(source, 0, sizeof(ae_source))
    source.rows = rows
    source.cols = cols
    source.row_start = row_start
    source.col_start = col_start
    source.col_stop = cols if col_stop is None else col_stop
    if rows < 0 or row_offset < 0 or not 0 <= source.col_start <= source.col_stop <= cols:
        raise ValueError(
            f"rows {row_offset}..{row_offset + rows} and columns {source.col_start}..{source.col_stop}"
            f" do not lie in a source of {cols} columns"
        )
    cdef Codes codes
    if src_dtype == "CODES":
        codes = src
        if codes is None or row_start < 0 or row_start + rows > codes.rows or cols != codes.cols:
            raise ValueError(f"rows {row_start}..{row_start + rows} of {cols} columns do not lie in {src!r}")
        source.codes = &codes._codes
        return codes
    cdef _View data = _View(src, False)
    source.type = _lookup(_SOURCE_TYPES, src_dtype, "source type")
    if row_start < 0:
        raise ValueError(f"row_start must not be negative, got {row_start}")
    cdef int64_t row_bytes = source_bytes(src_dtype, cols)
    data.need((row_start + rows) * row_bytes, "the source")
    source.data = <const char *>data.data + row_start * row_bytes
    return data


def pack_linear(
    Team team not None,
    str src_dtype not None,
    src,
    int64_t rows,
    int64_t cols,
    dst,
    str dst_dtype not None,
    int64_t row_offset=0,
    *,
    int64_t group=0,
    bint minimum=False,
    int64_t row_start=0,
    int64_t col_start=0,
    col_stop=None,
    int64_t panel_stride=1,
    int64_t panel_offset=0,
):
    """Packs rows [row_start, row_start + rows) and columns [col_start, col_stop) of a stored [_, cols] weight
    for LINEAR.

    They become rows [row_offset, row_offset + rows) of `dst`, a packed weight of `dst_dtype` with
    K = col_stop - col_start and `packed_bytes(N, K, dst_dtype, group, minimum)` bytes, whose panel i of PANEL
    rows lies at panel i * panel_stride + panel_offset. `src` and `dst` are buffers or addresses, but `src`
    is a `Codes` where `src_dtype` is CODES. Runs on the whole team without the GIL.
    """
    cdef ae_source source
    cdef ae_target target
    cdef int failed
    cdef _View out = _View(dst, True)
    held = _source(&source, src_dtype, src, rows, cols, row_offset, row_start, col_start, col_stop)
    target.type = _weight_type(dst_dtype, source.col_stop - source.col_start, group, minimum)
    target.data = <char *>out.data
    target.group = group
    target.minimum = minimum
    target.row_offset = row_offset
    target.panel_stride = panel_stride
    target.panel_offset = panel_offset
    if panel_offset < 0 or panel_stride <= panel_offset:
        raise ValueError(f"panel {panel_offset} does not lie in a stride of {panel_stride} panels")
    cdef int64_t panels = (row_offset + rows + AE_PANEL - 1) // AE_PANEL
    if rows:
        panels = (panels - 1) * panel_stride + panel_offset + 1
        out.need(
            ae_packed_bytes(
                panels * AE_PANEL, source.col_stop - source.col_start, target.type, group, minimum
            ),
            "the packed weight",
        )
    with nogil:
        failed = ae_pack(team._team, team._kernels, &source, &target)
    if failed:
        raise RuntimeError(_FORKED)


def compact(Team team not None, packed, int64_t n, int64_t k, dst, int64_t first=0, count=None):
    """Appends panels [first, first + count) to `dst`, a compact [n, k] weight (cpu/compact.h) that has those
    before; `packed` is these panels as `pack_linear` leaves them in BF16. All of them by default.

    The bytes that `dst` takes so far, of at most `packed_bytes(n, k, "BF16", COMPACT)`.
    """
    cdef int64_t panels = (n + AE_PANEL - 1) // AE_PANEL
    cdef int64_t number = panels - first if count is None else count
    cdef int64_t nbytes
    if n < 0 or k < 0 or first < 0 or number < 0 or first + number > panels:
        raise ValueError(f"panels {first}..{first + number} do not lie in a weight of shape [{n}, {k}]")
    cdef _View src = _View(packed, False)
    cdef _View out = _View(dst, True)
    src.need(ae_packed_bytes(number * AE_PANEL, k, AE_BF16, 0, 0), "the packed panels")
    out.need(ae_compact_most_bytes(panels, k), "the compact weight")
    with nogil:
        nbytes = ae_compact(team._team, <const char *>src.data, k, <char *>out.data, panels, first, number)
    if nbytes == -2:
        raise MemoryError("no memory to make a weight compact")
    if nbytes < 0:
        raise RuntimeError(_FORKED)
    return nbytes


def compact_bytes(weight, int64_t n):
    """Bytes that a compact weight of n rows, a buffer or an address, takes."""
    cdef int64_t panels = (n + AE_PANEL - 1) // AE_PANEL
    cdef _View data = _View(weight, False)
    if n < 0:
        raise ValueError(f"the number of rows must not be negative, got {n}")
    data.need(4 * (panels + 1), "the compact weight")
    return ae_compact_at(<const char *>data.data, panels) - <const char *>data.data


def convert(
    Team team not None,
    str src_dtype not None,
    src,
    int64_t rows,
    int64_t cols,
    dst,
    str dst_dtype not None,
    int64_t row_offset=0,
    *,
    int64_t row_start=0,
    int64_t col_start=0,
    col_stop=None,
):
    """Like `pack_linear`, into a plain row-major [_, K] matrix: embedding tables, norms (one row), biases."""
    cdef ae_source source
    cdef ae_target target
    cdef int failed
    cdef _View out = _View(dst, True)
    memset(&target, 0, sizeof(target))
    target.type = _lookup(_TYPES, dst_dtype, "weight type")
    target.data = <char *>out.data
    target.row_offset = row_offset
    held = _source(&source, src_dtype, src, rows, cols, row_offset, row_start, col_start, col_stop)
    cdef int64_t width = source.col_stop - source.col_start
    out.need((row_offset + rows) * width * (4 if target.type == AE_F32 else 2), "the destination")
    with nogil:
        failed = ae_convert(team._team, &source, &target)
    if failed:
        raise RuntimeError(_FORKED)
