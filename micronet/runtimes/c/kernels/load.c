/* Reading values of any map as floats. */
#ifndef LOAD_C
#define LOAD_C
#include "base.h"

static void load_values(const map *x, size_t pixel, int32_t channel, float *values, int32_t count)
{
    const uint8_t *at = pixel_at(x, pixel);
    int32_t i;
    if (x->type == FLOATS) {
        memcpy(values, at + (size_t)channel * sizeof(float), (size_t)count * sizeof(float));
    } else if (x->type == BYTES) {
        for (i = 0; i < count; i++)
            values[i] = (float)((int32_t)at[channel + i] - x->zero) * x->scale;
    } else if (x->type == INTS) {
        for (i = 0; i < count; i++)
            values[i] = ((float)((const i32 *)(const void *)at)[channel + i] - (float)x->zero) * x->scale;
    } else {
        for (i = 0; i < count; i++)
            values[i] = bit_at((const word *)(const void *)at, channel + i) ? 1.0f : -1.0f;
    }
}
#endif
