/* What follows sums of integers. */
#ifndef SUMS_C
#define SUMS_C
#include "layer.c"

INLINE uint32_t reached_limits(const int32_t *sums, const int32_t *limits, int32_t count)
{
    uint32_t signs = 0;
    int32_t i;
    for (i = 0; i < count; i++)
        signs |= (uint32_t)(sums[i] >= limits[i]) << i;
    return signs;
}

INLINE void to_floats(const layer *l, int32_t output, const int32_t *sums, float *values, int32_t count)
{
    int32_t i;
    if (l->base)
        for (i = 0; i < count; i++)
            values[i] = (float)(sums[i] + l->base[output + i]);
    else
        for (i = 0; i < count; i++)
            values[i] = (float)sums[i];
}

/* Turn at most BLOCK sums of integers, to which the base is not yet added, into values of a pixel. */
static void finish_sums(const map *out, const layer *l, size_t pixel, int32_t output, const int32_t *sums,
                        int32_t count)
{
    float values[BLOCK] LOCAL;
    if (l->limits) {
        int32_t limits[BLOCK] LOCAL;
        load_limits(l, output, count, limits);
        or_bits((word *)(void *)pixel_at(out, pixel), output,
                count == BLOCK ? reached_limits(sums, limits, BLOCK) : reached_limits(sums, limits, count), count);
        return;
    }
    if (count == BLOCK)
        to_floats(l, output, sums, values, BLOCK);
    else
        to_floats(l, output, sums, values, count);
    finish_floats(out, l, pixel, output, values, count);
}
#endif
