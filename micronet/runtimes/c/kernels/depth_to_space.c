/* Channels (block rows, block columns, C) to pixels of C channels. */
#include "base.h"

typedef struct {
    int32_t block_rows, block_columns, crop_top, crop_left;
} blocks;

static void depth_to_space(const map *x, const map *out, const blocks *b)
{
    int32_t row, column;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            int32_t y = row + b->crop_top, at = column + b->crop_left;
            size_t from = (size_t)(y / b->block_rows * x->columns + at / b->block_columns);
            size_t phase = (size_t)(y % b->block_rows * b->block_columns + at % b->block_columns);
            memcpy(pixel_at(out, (size_t)(row * out->columns + column)), pixel_at(x, from) + phase * out->pixel,
                   out->pixel);
        }
}
