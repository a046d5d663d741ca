# Straight lines between points.

cdef array.array _DOUBLES = Array("d")


def lines(const double[::1] x, const double[::1] y, int first, int count):
    """The values at first, first + 1, ... of the lines through points with rising x, at least one, as an
    `array` of `count` doubles that never falls. Beyond the points it stays level."""
    cdef array.array out = array.clone(_DOUBLES, count, False)
    cdef double* values = out.data.as_doubles
    cdef double value, last = 0.0
    cdef Py_ssize_t right = 0, points = x.shape[0]
    cdef int i
    for i in range(count):
        while right < points and x[right] <= first + i:
            right += 1
        value = y[max(right - 1, 0)]
        if 0 < right < points:
            value += (y[right] - value) * (first + i - x[right - 1]) / (x[right] - x[right - 1])
        last = max(last, value)
        values[i] = last
    return out
