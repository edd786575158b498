/* An output of the network as integers minus their zero point: channels, rows, columns. */
#include "base.h"

static void scores_levels(const map *x, int32_t *scores)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t channel;
    for (pixel = 0; pixel < pixels; pixel++)
        for (channel = 0; channel < x->channels; channel++) {
            const uint8_t *at = pixel_at(x, pixel);
            int32_t level = x->type == BYTES ? at[channel] : ((const i32 *)(const void *)at)[channel];
            scores[(size_t)channel * pixels + pixel] = level - x->zero;
        }
}
