# Weights stored as codes in words, beside their scales and zero points.

cdef extern from "cpu/codes.h" nogil:
    ctypedef struct ae_numbers:
        const char *words
        int64_t row_step, col_step
        int down, interleaved

    ctypedef struct ae_codes:
        int bits, zero_shift, scale_type
        int64_t group
        ae_numbers code, zero
        const char *scale
        int64_t scale_row_step, scale_col_step
        const int32_t *group_of


@cython.final
cdef class Codes:
    """A weight [rows, cols] of codes of `bits` 4 or 8, in groups of `group` columns:
    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] with g = k // group, or int32 `group_index[k]` if given.

    `layout` tells how words of 32 bits hold 32 / bits numbers, and in what order the rest lies (g groups):
        awq                 codes [cols, rows / 8], zeros [g, rows / 8], scales [g, rows]; 4 bits only, and a
                            word's numbers are 0 2 4 6 1 3 5 7 from the lowest bits up
        gptq                codes [cols * bits / 32, rows], zeros [g, rows * bits / 32], scales [g, rows]
        compressed-tensors  codes [rows, cols * bits / 32], zeros [rows * bits / 32, g], scales [rows, g]
    A stored zero point is smaller than what it stands for by `zero_shift`, modulo 2**bits; without `zeros`
    all are 2**(bits - 1). Scales are F32, BF16 or F16. The buffers are held, and must not change. ValueError
    where one is too small.
    """

    cdef ae_codes _codes
    cdef list _held
    cdef readonly int64_t rows, cols

    def __init__(
        self,
        str layout not None,
        int bits,
        int64_t rows,
        int64_t cols,
        int64_t group,
        codes,
        str scale_dtype not None,
        scales,
        zeros=None,
        int zero_shift=0,
        group_index=None,
    ):
        if bits not in (4, 8) or (layout == "awq" and bits != 4):
            raise ValueError(f"codes of {bits} bits in layout {layout!r} are not supported")
        if layout not in ("awq", "gptq", "compressed-tensors"):
            raise ValueError(f"layout {layout!r} is not supported; use awq, gptq or compressed-tensors")
        if scale_dtype not in _TYPES:
            raise ValueError(f"scales of type {scale_dtype!r} are not supported; use {', '.join(_TYPES)}")
        if rows < 0 or cols < 0 or group < 1:
            raise ValueError(f"a weight [{rows}, {cols}] in groups of {group} cannot be")
        cdef int64_t run = 32 // bits, groups = (cols + group - 1) // group
        cdef int64_t row_words = (rows + run - 1) // run, col_words = (cols + run - 1) // run
        cdef bint by_row = layout == "compressed-tensors"
        cdef ae_codes *c = &self._codes
        memset(c, 0, sizeof(ae_codes))
        self._held = []
        self.rows, self.cols = rows, cols
        c.bits, c.group, c.zero_shift = bits, group, zero_shift
        if layout == "awq":
            c.code = ae_numbers(self._data(codes, 4 * cols * row_words, "codes"), 1, row_words, True, True)
        else:
            c.code = ae_numbers(self._data(codes, 4 * rows * col_words, "codes"), 1, rows, False, False)
            if by_row:
                c.code.row_step, c.code.col_step = col_words, 1
        if zeros is not None:
            c.zero = ae_numbers(
                self._data(zeros, 4 * groups * row_words, "zeros"),
                groups if by_row else 1,
                1 if by_row else row_words,
                True,
                layout == "awq",
            )
        c.scale_type = _SOURCE_TYPES[scale_dtype]
        c.scale = self._data(scales, rows * groups * (4 if scale_dtype == "F32" else 2), "scales")
        c.scale_row_step = groups if by_row else 1
        c.scale_col_step = 1 if by_row else rows
        cdef int64_t k
        if group_index is not None:
            c.group_of = <const int32_t *>self._data(group_index, 4 * cols, "group_index")
            for k in range(cols):
                if not 0 <= c.group_of[k] < groups:
                    raise ValueError(f"group_index holds {c.group_of[k]}, and there are {groups} groups")

    cdef const char *_data(self, object source, int64_t nbytes, str what) except NULL:
        cdef _View view = _View(source, False)
        view.need(nbytes, what)
        self._held.append(view)
        return <const char *>view.data
