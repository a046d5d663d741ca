/* The tile instructions of amx.h as Intel's manual defines them (volume 1, chapter 18; volume 2), in C, for
 * machines without them. What would raise an exception ends the process.
 *
 * One step from the manual: a sum counts as denormal after it was rounded to one, which
 * differs for sums between 2^-126 - 2^-150 and 2^-126 - 2^-151 only.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tile_model {
    tile_config config; /* palette 0: not configured */
    uint8_t tile[8][TILE_ROWS_MAX][TILE_ROW_BYTES];
} tile_model;

static _Thread_local tile_model model;

static void model_expects(int what, const char *text) {
    if (what) return;
    fprintf(stderr, "tiles: %s\n", text);
    abort();
}

static void model_expects_tile(int t) {
    model_expects(model.config.palette == 1, "not configured");
    model_expects(model.config.rows[t] > 0, "a tile without rows");
    model_expects(model.config.row_bytes[t] % 4 == 0, "rows of parts of words");
}

static void model_configure(const tile_config *config) {
    const uint8_t zero[16] = {0};
    model_expects(config->palette == 1 && config->start_row == 0, "another palette");
    model_expects(!memcmp(config->zero, zero, sizeof config->zero), "reserved bytes");
    for (int t = 0; t < 16; t++) {
        model_expects(config->row_bytes[t] <= (t < 8 ? TILE_ROW_BYTES : 0), "rows too long");
        model_expects(config->rows[t] <= (t < 8 ? TILE_ROWS_MAX : 0), "too many rows");
        model_expects(!config->rows[t] == !config->row_bytes[t], "half a size");
    }
    memset(&model, 0, sizeof model);
    model.config = *config;
}

static void model_release(void) { memset(&model, 0, sizeof model); }

static void model_zero(int t) {
    model_expects_tile(t);
    memset(model.tile[t], 0, sizeof model.tile[t]);
}

static void model_load(int t, const char *from, int64_t stride) {
    model_zero(t);
    for (int r = 0; r < model.config.rows[t]; r++)
        memcpy(model.tile[t][r], from + r * stride, model.config.row_bytes[t]);
}

static void model_store(int t, char *to, int64_t stride) {
    model_expects_tile(t);
    for (int r = 0; r < model.config.rows[t]; r++)
        memcpy(to + r * stride, model.tile[t][r], model.config.row_bytes[t]);
}

static float model_flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

static float model_bf16(const uint8_t *pairs, int i) {
    uint16_t half;
    memcpy(&half, pairs + 2 * i, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return model_flushed(x);
}

static const tile_config *model_expects_product(int c, int a, int b) {
    const tile_config *config = &model.config;
    model_expects_tile(c);
    model_expects_tile(a);
    model_expects_tile(b);
    model_expects(c != a && c != b && a != b, "one tile twice");
    model_expects(config->rows[c] == config->rows[a], "rows of the sums");
    model_expects(config->row_bytes[c] == config->row_bytes[b], "columns of the sums");
    model_expects(config->row_bytes[a] / 4 == config->rows[b], "k of both sides");
    return config;
}

static void model_clear_below(int c) {
    const int rows = model.config.rows[c];
    memset(model.tile[c][rows], 0, (size_t)(TILE_ROWS_MAX - rows) * TILE_ROW_BYTES);
}

static void model_dot_bf16(int c, int a, int b) {
    const tile_config *config = model_expects_product(c, a, b);
    for (int m = 0; m < config->rows[c]; m++) {
        float sums[TILE_ROW_BYTES / 2] = {0}, *row = (float *)model.tile[c][m];
        for (int k = 0; k < config->rows[b]; k++)
            for (int n = 0; n < config->row_bytes[c] / 4; n++)
                for (int i = 0; i < 2; i++) {
                    const float x = model_bf16(model.tile[a][m], 2 * k + i);
                    const float w = model_bf16(model.tile[b][k], 2 * n + i);
                    sums[2 * n + i] = model_flushed(fmaf(x, w, sums[2 * n + i]));
                }
        for (int n = 0; n < config->row_bytes[c] / 4; n++) {
            const float both = model_flushed(sums[2 * n] + sums[2 * n + 1]);
            row[n] = model_flushed(model_flushed(row[n]) + both);
        }
    }
    model_clear_below(c);
}

static void model_dot_int8(int c, int a, int b) {
    const tile_config *config = model_expects_product(c, a, b);
    for (int m = 0; m < config->rows[c]; m++) {
        uint32_t *row = (uint32_t *)model.tile[c][m];
        for (int k = 0; k < config->rows[b]; k++)
            for (int n = 0; n < config->row_bytes[c] / 4; n++)
                for (int i = 0; i < 4; i++)
                    row[n] += (uint32_t)((int8_t)model.tile[a][m][4 * k + i] * model.tile[b][k][4 * n + i]);
    }
    model_clear_below(c);
}

#define TILE_CONFIGURE(config) model_configure(config)
#define TILE_RELEASE() model_release()
#define TILE_ZERO(tile) model_zero(tile)
#define TILE_LOAD(tile, from, stride) model_load(tile, (const char *)(from), stride)
#define TILE_STORE(tile, to, stride) model_store(tile, (char *)(to), stride)
#define TILE_DOT_BF16(c, a, b) model_dot_bf16(c, a, b)
#define TILE_DOT_INT8(c, a, b) model_dot_int8(c, a, b)
