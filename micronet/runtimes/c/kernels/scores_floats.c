/* An output of the network as floats: channels, rows, columns. */
#include "load.c"

static void scores_floats(const map *x, float *scores)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t channel;
    for (pixel = 0; pixel < pixels; pixel++)
        for (channel = 0; channel < x->channels; channel++)
            load_values(x, pixel, channel, scores + (size_t)channel * pixels + pixel, 1);
}
