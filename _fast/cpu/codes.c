#include "codes.h"

#include <string.h>

#include "dequantize.h"

/* Rows and columns whose codes are staged on their way to floats. */
#define ROWS 8
#define CHUNK 256

static uint32_t word_at(const ae_numbers *m, int64_t row, int64_t col) {
    uint32_t word;
    memcpy(&word, m->words + 4 * (row * m->row_step + col * m->col_step), 4);
    return word;
}

/* Words side by side, and as many lanes of eight bytes. */
#define LANES 4
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint64_t lanes __attribute__((vector_size(8 * LANES)));

/* The numbers of a word, one a byte, the lowest bits first. A macro, for words and vectors of them. */
#define SPREAD(x, bits)                                 \
    do {                                                \
        if ((bits) == 8) break;                         \
        (x) = ((x) | (x) << 16) & 0x0000FFFF0000FFFF;   \
        (x) = ((x) | (x) << 8) & 0x00FF00FF00FF00FF;    \
        (x) = ((x) | (x) << 4) & 0x0F0F0F0F0F0F0F0F;    \
    } while (0)

/* Which number of its run the i-th lowest bits of a word are. */
static int number_of(const ae_numbers *m, int i) { return m->interleaved ? i % 4 * 2 + i / 4 : i; }

static int number_at(const ae_numbers *m, int bits, int64_t row, int64_t col) {
    const int run = 32 / bits, number = (int)((m->down ? row : col) % run);
    const uint32_t word = word_at(m, m->down ? row / run : row, m->down ? col : col / run);
    int i = 0;
    while (number_of(m, i) != number) i++;
    return (int)(word >> bits * i & ((1u << bits) - 1));
}

/* Byte j of x[i] changes places with byte i of x[j], in every lane. */
static inline void transpose(lanes x[8]) {
    static const uint64_t low[3] = {0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF};
#pragma GCC unroll 3
    for (int s = 0; s < 3; s++) {
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; pair++) {
            const int apart = 1 << s, i = pair / apart * 2 * apart + pair % apart, shift = 8 << s;
            const lanes change = (x[i] >> shift ^ x[i + apart]) & low[s];
            x[i] ^= change << shift;
            x[i + apart] ^= change;
        }
    }
}

/* Columns [start, start + n), at most 8, of `count` runs of rows from `first` on, which are neighbours. */
static inline void read_square(uint8_t *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows,
                               int64_t first, int64_t count, int64_t start, int64_t n) {
    const int run = 32 / c->bits;
    const char *from = c->code.words + 4 * (first + start * c->code.col_step);
    lanes x[8] = {0};
    for (int64_t j = 0; j < n; j++, from += 4 * c->code.col_step) {
        words w = {0};
        memcpy(&w, from, 4 * (size_t)count);
        x[j] = __builtin_convertvector(w, lanes);
        SPREAD(x[j], c->bits);
    }
    transpose(x);
    for (int i = 0; i < run; i++) {
        uint64_t bytes[LANES];
        memcpy(bytes, x + i, sizeof bytes);
        for (int64_t j = 0; j < count; j++) {
            const int64_t r = (first + j) * run + number_of(&c->code, i) - row;
            if (r >= 0 && r < rows) memcpy(out + r * stride, bytes + j, (size_t)n);
        }
    }
}

static void read_down(uint8_t *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows,
                      int64_t start, int64_t count) {
    const int64_t run = 32 / c->bits, stop = (row + rows + run - 1) / run;
    for (int64_t k = 0; k < count; k += 8) {
        const int64_t n = count - k < 8 ? count - k : 8;
        for (int64_t first = row / run; first < stop; first += LANES) {
            const int64_t left = stop - first < LANES ? stop - first : LANES;
            if (n == 8 && left == LANES) /* with numbers that the compiler knows */
                read_square(out + k, stride, c, row, rows, first, LANES, start + k, 8);
            else
                read_square(out + k, stride, c, row, rows, first, left, start + k, n);
        }
    }
}

static void read_along(uint8_t *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows,
                       int64_t start, int64_t count) {
    const int run = 32 / c->bits;
    for (int64_t word = start / run; word * run < start + count; word++) {
        const int64_t first = word * run - start, skip = first < 0 ? -first : 0;
        const int64_t end = first + run < count ? first + run : count, n = end - first - skip;
        for (int64_t r = 0; r < rows; r++) {
            uint64_t x = word_at(&c->code, row + r, word);
            SPREAD(x, c->bits);
            x >>= 8 * skip;
            uint8_t *to = out + r * stride + first + skip;
            if (n == 8)
                memcpy(to, &x, 8);
            else
                memcpy(to, &x, (size_t)n);
        }
    }
}

void ae_read_codes(uint8_t *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows, int64_t start,
                   int64_t count) {
    (c->code.down ? read_down : read_along)(out, stride, c, row, rows, start, count);
}

void ae_read_scale(float *scale, int *zero, const ae_codes *c, int64_t row, int64_t group) {
    ae_dequantize(scale, c->scale, c->scale_type, row * c->scale_row_step + group * c->scale_col_step, 1);
    *zero = 1 << (c->bits - 1);
    if (c->zero.words)
        *zero = (number_at(&c->zero, c->bits, row, group) + c->zero_shift) & ((1 << c->bits) - 1);
}

void ae_read_values(float *out, int64_t stride, const ae_codes *c, int64_t row, int64_t rows, int64_t start,
                    int64_t count) {
    uint8_t q[ROWS * CHUNK];
    for (int64_t k = 0, n; k < count; k += n) {
        n = count - k < CHUNK ? count - k : CHUNK;
        for (int64_t r = 0; r < rows; r++) {
            if (r % ROWS == 0)
                ae_read_codes(q, CHUNK, c, row + r, rows - r < ROWS ? rows - r : ROWS, start + k, n);
            for (int64_t i = 0, end; i < n; i = end) {
                const int64_t at = start + k + i, group = c->group_of ? c->group_of[at] : at / c->group;
                end = c->group_of ? i + 1 : (group + 1) * c->group - start - k;
                if (end > n) end = n;
                float scale;
                int zero;
                ae_read_scale(&scale, &zero, c, row + r, group);
                for (int64_t j = i; j < end; j++)
                    out[r * stride + k + j] = (float)(q[r % ROWS * CHUNK + j] - zero) * scale;
            }
        }
    }
}
