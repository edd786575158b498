/* Functions of uint8 values, as a table of all 256. */
#include "base.h"

static void look_up(const map *x, const map *out, const uint8_t *table)
{
    const uint8_t *from = pixel_at(x, 0);
    uint8_t *to = pixel_at(out, 0);
    size_t i, count = pixels_of(x) * (size_t)x->channels;
    for (i = 0; i < count; i++)
        to[i] = table[from[i]];
}
