/* Feature maps as one row of values: channels, rows, columns, as in training. */
#include "base.h"

static void flatten(const map *x, const map *out)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t channel;
    if (x->type == BITS)
        memset(pixel_at(out, 0), 0, out->pixel);
    for (pixel = 0; pixel < pixels; pixel++)
        for (channel = 0; channel < x->channels; channel++) {
            size_t target = (size_t)channel * pixels + pixel;
            if (x->type == BITS) {
                if (bit_at((const word *)(const void *)pixel_at(x, pixel), channel))
                    set_bit((word *)(void *)pixel_at(out, 0), (int32_t)target);
            } else {
                size_t bytes = x->type == BYTES ? 1 : 4;
                memcpy(pixel_at(out, 0) + target * bytes, pixel_at(x, pixel) + (size_t)channel * bytes, bytes);
            }
        }
}
