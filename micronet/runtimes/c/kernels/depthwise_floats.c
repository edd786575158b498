/* Depthwise convolutions of floats; weights by kernel row, column, channel. Sums as in conv_floats.c. */
#include "lanes.h"
#include "layer.c"

static void depthwise_floats(const map *x, const map *out, const layer *l)
{
    float sums[BLOCK] LOCAL;
    int32_t row, column, first, i, j, c;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            size_t pixel = (size_t)(row * out->columns + column);
            int32_t top = row * l->stride_rows - l->pad_top, left = column * l->stride_columns - l->pad_left;
            clear_signs(out, pixel);
            for (first = 0; first < x->channels; first += BLOCK) {
                int32_t count = min_int(BLOCK, x->channels - first);
                for (c = 0; c < BLOCK; c++)
                    sums[c] = 0.0f;
                for (i = 0; i < l->kernel_rows; i++)
                    for (j = 0; j < l->kernel_columns; j++) {
                        int32_t y = top + i * l->dilation_rows, at = left + j * l->dilation_columns;
                        const float *weight =
                            (const float *)l->weight + (size_t)((i * l->kernel_columns + j) * x->channels + first);
                        const f32 *values;
                        if (y < 0 || y >= x->rows || at < 0 || at >= x->columns)
                            continue;
                        values = (const f32 *)(const void *)pixel_at(x, (size_t)(y * x->columns + at)) + first;
                        for (c = 0; c < count; c++)
                            sums[c] = fused(values[c], weight[c], sums[c]);
                    }
                finish_floats(out, l, pixel, first, sums, count);
            }
        }
}
