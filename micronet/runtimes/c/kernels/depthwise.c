/* Depthwise convolutions of uint8 values and int8 weights (kernel rows, columns, channels), without a patch. */
#include "sums.c"

static void depthwise_bytes(const map *x, const map *out, const layer *l)
{
    int32_t sums[BLOCK] LOCAL, row, column, first, i, j, c;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            size_t pixel = (size_t)(row * out->columns + column);
            int32_t top = row * l->stride_rows - l->pad_top, left = column * l->stride_columns - l->pad_left;
            clear_signs(out, pixel);
            for (first = 0; first < x->channels; first += BLOCK) {
                int32_t count = min_int(BLOCK, x->channels - first);
                memset(sums, 0, sizeof sums);
                for (i = 0; i < l->kernel_rows; i++)
                    for (j = 0; j < l->kernel_columns; j++) {
                        int32_t y = top + i * l->dilation_rows, at = left + j * l->dilation_columns;
                        const int8_t *weight =
                            (const int8_t *)l->weight + (size_t)((i * l->kernel_columns + j) * x->channels + first);
                        const uint8_t *values;
                        if (y < 0 || y >= x->rows || at < 0 || at >= x->columns)
                            continue;
                        values = pixel_at(x, (size_t)(y * x->columns + at)) + first;
                        for (c = 0; c < count; c++)
                            sums[c] += (values[c] - x->zero) * weight[c];
                    }
                finish_sums(out, l, pixel, first, sums, count);
            }
        }
}
