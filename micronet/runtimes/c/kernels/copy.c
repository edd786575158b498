/* Copies of a part of a map: concatenations, slices and padding. */
#include "base.h"

typedef struct {
    int32_t row, column, channel;          /* of the first value that is read */
    int32_t to_row, to_column, to_channel; /* and where it goes */
    int32_t rows, columns, channels, stride_rows, stride_columns;
    uint32_t bytes; /* of a value */
} part;

static void copy_part(const map *x, const map *out, const part *p)
{
    int32_t row, column;
    for (row = 0; row < p->rows; row++)
        for (column = 0; column < p->columns; column++) {
            size_t from = (size_t)((p->row + row * p->stride_rows) * x->columns + p->column
                                   + column * p->stride_columns);
            size_t to = (size_t)((p->to_row + row) * out->columns + p->to_column + column);
            memcpy(pixel_at(out, to) + (size_t)p->to_channel * p->bytes,
                   pixel_at(x, from) + (size_t)p->channel * p->bytes, (size_t)p->channels * p->bytes);
        }
}
