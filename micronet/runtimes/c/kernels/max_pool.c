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
    } else if (x->type == WHOLES) {
        whole *best = (whole *)(void *)to;
        const whole *own = (const whole *)(const void *)from;
        for (i = 0; i < x->channels; i++)
            best[i] = most(best[i], own[i]);
    } else {
        real *best = (real *)(void *)to;
        const real *own = (const real *)(const void *)from;
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
            int32_t bottom = least(top + p->kernel_rows, x->rows);
            int32_t right = least(left + p->kernel_columns, x->columns);
            uint8_t *to = pixel_at(out, (size_t)(row * out->columns + column));
            int first = 1;
            for (i = most(top, 0); i < bottom; i++)
                for (j = most(left, 0); j < right; j++) {
                    const uint8_t *from = pixel_at(x, (size_t)(i * x->columns + j));
                    if (first)
                        memcpy(to, from, x->pixel);
                    else
                        maximum(x, from, to);
                    first = 0;
                }
        }
}
