/* Averages of windows. Sums of integers are exact, and scaled after the division. */
#include "pool.h"

INLINE int32_t centred(const map *x, const uint8_t *at, int32_t channel)
{
    if (x->type == BYTES)
        return (int32_t)at[channel] - x->zero;
    if (x->type == WHOLES)
        return ((const whole *)(const void *)at)[channel] - x->zero;
    return bit_at((const word *)(const void *)at, channel) ? 1 : -1;
}

static void average_pool(const map *x, const map *out, const pool *p)
{
    int32_t row, column, channel, i, j;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            int32_t top = row * p->stride_rows - p->pad_top, left = column * p->stride_columns - p->pad_left;
            int32_t above = most(top, 0), before = most(left, 0);
            int32_t bottom = least(top + p->kernel_rows, x->rows);
            int32_t right = least(left + p->kernel_columns, x->columns);
            int32_t rows = bottom - above, columns = right - before;
            real *to = (real *)(void *)pixel_at(out, (size_t)(row * out->columns + column));
            if (p->count_pads) {
                rows = least(p->kernel_rows, x->rows + p->pad_bottom - top);
                columns = least(p->kernel_columns, x->columns + p->pad_right - left);
            }
            for (channel = 0; channel < x->channels; channel++) {
                float divisor = (float)(rows * columns), total = 0.0f;
                int64_t sum = 0;
                for (i = above; i < bottom; i++)
                    for (j = before; j < right; j++) {
                        const uint8_t *at = pixel_at(x, (size_t)(i * x->columns + j));
                        if (x->type == REALS)
                            total = total + ((const real *)(const void *)at)[channel];
                        else
                            sum += centred(x, at, channel);
                    }
                to[channel] = x->type == REALS ? total / divisor : (float)sum / divisor * x->scale;
            }
        }
}
