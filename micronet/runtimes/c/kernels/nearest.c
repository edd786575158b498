/* Resizes that take the nearest pixels. places: their rows, then their columns. */
#include "base.h"

static void nearest(const map *x, const map *out, const uint16_t *places)
{
    int32_t row, column;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++)
            memcpy(pixel_at(out, (size_t)(row * out->columns + column)),
                   pixel_at(x, (size_t)(places[row] * x->columns + places[out->rows + column])), out->pixel);
}
