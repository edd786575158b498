/* Fill a map with the value 0. */
#include "base.h"

static void fill_zeros(const map *out)
{
    size_t i, count = pixels_of(out) * (size_t)out->channels;
    uint8_t *at = pixel_at(out, 0);
    if (out->type == INTS)
        for (i = 0; i < count; i++)
            ((i32 *)(void *)at)[i] = out->zero;
    else
        memset(at, out->type == BYTES ? out->zero : 0, pixels_of(out) * out->pixel);
}
