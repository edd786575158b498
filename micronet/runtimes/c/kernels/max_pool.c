/* Maxima of windows; those of signs are the OR of their bits. Padding never wins, NaN does. */
#include "pool.h"

static void maximum(const map *x, const uint8_t *from, uint8_t *to)
{
    int32_t i;
    if (x->type == BITS) {
        for (i = 0; i < x->channels; i += 64)
            ((word *)(void *)to)[i / 64] |= ((const word *)(const void *)from)[i / 64];
    } else if (x->type == BYTES) {
        for (i = 0; i < x->channels; i++)
            to[i] = to[i] > from[i] ? to[i] : from[i];
    } else if (x->type == INTS) {
        i32 *best = (i32 *)(void *)to;
        const i32 *own = (const i32 *)(const void *)from;
        for (i = 0; i < x->channels; i++)
            best[i] = max_int(best[i], own[i]);
    } else {
        f32 *best = (f32 *)(void *)to;
        const f32 *own = (const f32 *)(const void *)from;
        for (i = 0; i < x->channels; i++)
            best[i] = best[i] >= own[i] || !(best[i] >= best[i]) ? best[i] : own[i];
    }
}

static void max_pool(const map *x, const map *out, const pool *p)
{
    int32_t row, column, i, j;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            int32_t top = row * p->stride_rows - p->pad_top, left = column * p->stride_columns - p->pad_left;
            int32_t bottom = min_int(top + p->kernel_rows, x->rows);
            int32_t right = min_int(left + p->kernel_columns, x->columns);
            uint8_t *to = pixel_at(out, (size_t)(row * out->columns + column));
            int first = 1;
            for (i = max_int(top, 0); i < bottom; i++)
                for (j = max_int(left, 0); j < right; j++) {
                    const uint8_t *from = pixel_at(x, (size_t)(i * x->columns + j));
                    if (first)
                        memcpy(to, from, x->pixel);
                    else
                        maximum(x, from, to);
                    first = 0;
                }
        }
}
