/* Copying the window of an output pixel into one row of values: kernel rows, columns, channels of a group. */
#ifndef PATCH_C
#define PATCH_C
#include "layer.c"
#include "patches.h"

INLINE int32_t total_of(const uint8_t *values, int32_t count)
{
    int32_t total = 0, i;
    for (i = 0; i < count; i++)
        total += values[i];
    return total;
}

/* Return the window of a group as values of ``bytes`` each; those outside the map are ``outside`` (a byte). */
static const void *patch_of(const map *x, const layer *l, int32_t group, int32_t row, int32_t column, size_t bytes,
                            int32_t outside, uint8_t *patch)
{
    int32_t top = row * l->stride_rows - l->pad_top, left = column * l->stride_columns - l->pad_left, i, j;
    size_t start = (size_t)group * (size_t)l->inputs * bytes, size = (size_t)l->inputs * bytes;
    uint8_t *to = patch;
    if (l->kernel_rows == 1 && l->kernel_columns == 1 && top >= 0 && top < x->rows && left >= 0 && left < x->columns)
        return pixel_at(x, (size_t)(top * x->columns + left)) + start;
    for (i = 0; i < l->kernel_rows; i++) {
        int32_t y = top + i * l->dilation_rows;
        if (y < 0 || y >= x->rows) {
            memset(to, outside, (size_t)l->kernel_columns * size);
            to += (size_t)l->kernel_columns * size;
        } else if (l->groups == 1 && l->dilation_columns == 1 && left >= 0 && left + l->kernel_columns <= x->columns) {
            memcpy(to, pixel_at(x, (size_t)(y * x->columns + left)), (size_t)l->kernel_columns * size);
            to += (size_t)l->kernel_columns * size;
        } else {
            for (j = 0; j < l->kernel_columns; j++) {
                int32_t at = left + j * l->dilation_columns;
                if (at < 0 || at >= x->columns)
                    memset(to, outside, size);
                else
                    memcpy(to, pixel_at(x, (size_t)(y * x->columns + at)) + start, size);
                to += size;
            }
        }
    }
    return patch;
}
#endif
