# Checkpoint tensors into the forms that ops read.

cdef extern from "cpu/pack.h" nogil:
    ctypedef struct ae_source:
        const char *data
        int type
        int64_t rows, cols, col_start, col_stop

    enum:
        AE_SRC_F32, AE_SRC_BF16, AE_SRC_F16
        AE_SRC_Q8_0, AE_SRC_Q4_0, AE_SRC_Q4_1, AE_SRC_Q4_K, AE_SRC_Q5_K, AE_SRC_Q6_K

    int ae_source_block(int type)
    int64_t ae_source_bytes(int type, int64_t count)
    int64_t ae_packed_bytes(int64_t n, int64_t k, int type)
    int ae_pack(ae_team *team, const ae_source *source, void *dst, int dst_type, int64_t row_offset)
    int ae_convert(ae_team *team, const ae_source *source, void *dst, int dst_type, int64_t row_offset)


_SOURCE_TYPES = {
    "F32": AE_SRC_F32,
    "BF16": AE_SRC_BF16,
    "F16": AE_SRC_F16,
    "Q8_0": AE_SRC_Q8_0,
    "Q4_0": AE_SRC_Q4_0,
    "Q4_1": AE_SRC_Q4_1,
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


def packed_bytes(int64_t n, int64_t k, str dtype not None):
    """Bytes of a packed [n, k] weight of type `dtype`."""
    if n < 0 or k < 0:
        raise ValueError(f"the shape must not be negative, got [{n}, {k}]")
    return ae_packed_bytes(n, k, _lookup(_TYPES, dtype, "weight type"))


cdef _transfer(
    bint pack,
    Team team,
    str src_dtype,
    object src,
    int64_t rows,
    int64_t cols,
    object dst,
    str dst_dtype,
    int64_t row_offset,
    int64_t col_start,
    object col_stop,
):
    cdef ae_source source
    cdef int type = _lookup(_TYPES, dst_dtype, "weight type"), failed
    cdef _View data = _View(src, False), out = _View(dst, True)
    source.type = _lookup(_SOURCE_TYPES, src_dtype, "source type")
    source.rows = rows
    source.cols = cols
    source.col_start = col_start
    source.col_stop = cols if col_stop is None else col_stop
    if rows < 0 or row_offset < 0 or not 0 <= source.col_start <= source.col_stop <= cols:
        raise ValueError(
            f"rows {row_offset}..{row_offset + rows} and columns {source.col_start}..{source.col_stop}"
            f" do not lie in a source of {cols} columns"
        )
    cdef int64_t width = source.col_stop - source.col_start
    data.need(rows * source_bytes(src_dtype, cols), "the source")
    if pack:
        out.need(ae_packed_bytes(row_offset + rows, width, type), "the packed weight")
    else:
        out.need((row_offset + rows) * width * (4 if type == AE_F32 else 2), "the destination")
    source.data = <const char *>data.data
    with nogil:
        failed = (ae_pack if pack else ae_convert)(team._team, &source, out.data, type, row_offset)
    if failed:
        raise RuntimeError(_FORKED)


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
    int64_t col_start=0,
    col_stop=None,
):
    """Packs columns [col_start, col_stop) of a stored [rows, cols] weight for LINEAR.

    They become rows [row_offset, row_offset + rows) of `dst`, a packed weight of `dst_dtype` with
    K = col_stop - col_start and `packed_bytes(N, K, dst_dtype)` bytes. `src` and `dst` are buffers or
    addresses. Runs on the whole team without the GIL.
    """
    _transfer(True, team, src_dtype, src, rows, cols, dst, dst_dtype, row_offset, col_start, col_stop)


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
    int64_t col_start=0,
    col_stop=None,
):
    """Like `pack_linear`, into a plain row-major [_, K] matrix: embedding tables, norms (one row), biases."""
    _transfer(False, team, src_dtype, src, rows, cols, dst, dst_dtype, row_offset, col_start, col_stop)
