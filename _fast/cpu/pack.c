#include "pack.h"

#include <string.h>

#include "half.h"

/* Columns converted at a time: a multiple of every quantization block. */
#define CHUNK 256
/* Row stride of the staged chunk, off the powers of two that would collide in the cache. */
#define STRIDE (CHUNK + 8)
/* Rows that are read at a time. */
#define ROWS 8

static void narrow(void *out, const float *x, int64_t count, int type) {
    uint16_t *h = out;
    if (type == AE_F32)
        memcpy(out, x, (size_t)count * 4);
    else if (type == AE_BF16)
        for (int64_t i = 0; i < count; i++) h[i] = ae_f32_to_bf16(x[i]);
    else
        for (int64_t i = 0; i < count; i++) h[i] = ae_f32_to_f16(x[i]);
}

/* The first column after `col` that ends a chunk of the source. */
static int64_t chunk_end(const ae_source *s, int64_t col) {
    int64_t end = (col / CHUNK + 1) * CHUNK;
    return end < s->col_stop ? end : s->col_stop;
}

/* Staged columns [k, k + count) of lanes [lane, lane + lanes), into their panel. Runs of 16 columns keep the
 * cache lines that are written few enough to stay in L1. */
static void interleave(char *panel, const char *staged, int type, int64_t k, int64_t count, int lane,
                       int lanes) {
    for (int64_t i = 0; i < count; i += 16) {
        const int64_t n = count - i < 16 ? count - i : 16, at = k + i;
        for (int r = 0; r < lanes; r++) {
            const uint32_t *words = (const uint32_t *)staged + r * STRIDE + i;
            const uint16_t *halves = (const uint16_t *)staged + r * STRIDE + i;
            if (type == AE_F32) {
                uint32_t *d = (uint32_t *)panel + at * AE_PANEL + lane + r;
                for (int64_t j = 0; j < n; j++) d[j * AE_PANEL] = words[j];
            } else if (type == AE_F16) {
                uint16_t *d = (uint16_t *)panel + at * AE_PANEL + lane + r;
                for (int64_t j = 0; j < n; j++) d[j * AE_PANEL] = halves[j];
            } else {
                uint16_t *d = (uint16_t *)panel + (lane + r) * 2;
                int64_t j = at;
                if (at % 2 == 0)
                    for (; j + 1 < at + n; j += 2) memcpy(d + j * AE_PANEL, halves + j - at, 4);
                for (; j < at + n; j++) d[j / 2 * 2 * AE_PANEL + j % 2] = halves[j - at];
            }
        }
    }
}

static void pack_plain(void *packing, const ae_thread *thread) {
    const ae_packing *p = packing;
    const ae_source *s = p->source;
    const int64_t columns = s->col_stop - s->col_start, panels = ae_target_panels(p);
    const int type = p->target->type, size = type == AE_F32 ? 4 : 2;
    float wide[ROWS * CHUNK];
    _Alignas(64) char staged[AE_PANEL * STRIDE * 4];
    for (int64_t i; (i = ae_next(thread, panels, 1)) >= 0;) {
        const ae_lanes at = ae_lanes_of(p, i);
        for (int64_t c = s->col_start, end; c < s->col_stop; c = end) {
            end = chunk_end(s, c);
            for (int r = 0; r < at.lanes; r++) {
                const int left = at.lanes - r < ROWS ? at.lanes - r : ROWS;
                if (r % ROWS == 0) ae_source_values(wide, CHUNK, s, at.row + r, left, c, end - c);
                narrow(staged + r * STRIDE * size, wide + r % ROWS * CHUNK, end - c, type);
            }
            interleave(at.panel, staged, type, c - s->col_start, end - c, at.lane, at.lanes);
        }
        if (type == AE_BF16 && columns % 2) {
            uint16_t *pad = (uint16_t *)at.panel + (columns - 1) * AE_PANEL + at.lane * 2 + 1;
            for (int r = 0; r < at.lanes; r++) pad[r * 2] = 0;
        }
    }
}

int ae_pack(ae_team *team, const ae_kernels *kernels, const ae_source *source, const ae_target *target) {
    ae_packing p = {source, target};
    const int64_t group = target->group;
    ae_job job = ae_is_whole(group) ? kernels->pack_whole : group ? ae_pack_quantized : pack_plain;
    return ae_team_run(team, job, &p);
}

static void convert_rows(void *packing, const ae_thread *thread) {
    const ae_packing *p = packing;
    const ae_source *s = p->source;
    const int64_t columns = s->col_stop - s->col_start;
    const int type = p->target->type, size = type == AE_F32 ? 4 : 2;
    float wide[ROWS * CHUNK];
    for (int64_t i; (i = ae_next(thread, s->rows, ROWS)) >= 0;) {
        const int64_t rows = s->rows - i < ROWS ? s->rows - i : ROWS;
        char *out = p->target->data + (p->target->row_offset + i) * columns * size;
        for (int64_t c = s->col_start, end; c < s->col_stop; c = end) {
            end = chunk_end(s, c);
            ae_source_values(wide, CHUNK, s, i, rows, c, end - c);
            for (int64_t r = 0; r < rows; r++)
                narrow(out + (r * columns + c - s->col_start) * size, wide + r * CHUNK, end - c, type);
        }
    }
}

int ae_convert(ae_team *team, const ae_source *source, const ae_target *target) {
    ae_packing p = {source, target};
    return ae_team_run(team, convert_rows, &p);
}
