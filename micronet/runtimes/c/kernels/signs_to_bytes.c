/* Signs as uint8 values with the zero point 1: 0 and 2. */
#include "base.h"

static void signs_to_bytes(const map *x, const map *out)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t channel;
    for (pixel = 0; pixel < pixels; pixel++) {
        const word *from = (const word *)(const void *)pixel_at(x, pixel);
        uint8_t *to = pixel_at(out, pixel);
        for (channel = 0; channel < x->channels; channel++)
            to[channel] = (uint8_t)(2 * bit_at(from, channel));
    }
}
