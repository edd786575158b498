/* Concatenations of signs: copy all channels of a map to those from ``channel`` on of another. */
#include "base.h"

static void concat_signs(const map *x, const map *out, int32_t channel)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t i;
    for (pixel = 0; pixel < pixels; pixel++) {
        const word *from = (const word *)(const void *)pixel_at(x, pixel);
        word *to = (word *)(void *)pixel_at(out, pixel);
        if (channel == 0)
            memset(to, 0, out->pixel);
        for (i = 0; i < x->channels; i += 64) {
            int32_t place = channel + i, shift = place & 63;
            to[place >> 6] |= from[i >> 6] << shift;
            if (shift + min_int(64, x->channels - i) > 64)
                to[(place >> 6) + 1] |= from[i >> 6] >> (64 - shift);
        }
    }
}
