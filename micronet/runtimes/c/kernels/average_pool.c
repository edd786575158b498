/* Averages of windows. Sums of integers are exact, and scaled after the division. */
#include "pool.h"

INLINE int32_t centred(const map *x, const uint8_t *at, int32_t channel)
{
    if (x->type == BYTES)
        return (int32_t)at[channel] - x->zero;
    if (x->type == INTS)
        return ((const i32 *)(const void *)at)[channel] - x->zero;
    return bit_at((const word *)(const void *)at, channel) ? 1 : -1;
}

static void average_pool(const map *x, const map *out, const pool *p)
{
    int32_t row, column, channel, i, j;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            int32_t top = row * p->stride_rows - p->pad_top, left = column * p->stride_columns - p->pad_left;
            int32_t above = max_int(top, 0), before = max_int(left, 0);
            int32_t bottom = min_int(top + p->kernel_rows, x->rows);
            int32_t right = min_int(left + p->kernel_columns, x->columns);
            int32_t rows = bottom - above, columns = right - before;
            f32 *to = (f32 *)(void *)pixel_at(out, (size_t)(row * out->columns + column));
            if (p->count_pads) {
                rows = min_int(p->kernel_rows, x->rows + p->pad_bottom - top);
                columns = min_int(p->kernel_columns, x->columns + p->pad_right - left);
            }
            for (channel = 0; channel < x->channels; channel++) {
                float divisor = (float)(rows * columns), total = 0.0f;
                int64_t sum = 0;
                for (i = above; i < bottom; i++)
                    for (j = before; j < right; j++) {
                        const uint8_t *at = pixel_at(x, (size_t)(i * x->columns + j));
                        if (x->type == FLOATS)
                            total = total + ((const f32 *)(const void *)at)[channel];
                        else
                            sum += centred(x, at, channel);
                    }
                to[channel] = x->type == FLOATS ? total / divisor : (float)sum / divisor * x->scale;
            }
        }
}
