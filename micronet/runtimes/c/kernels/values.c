/* Storing floats in any map after the functions that follow a layer. */
#ifndef VALUES_C
#define VALUES_C
#include "base.h"

#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds half to even below 2^22 */

/* Set a pixel's signs to -1 before others are set. */
INLINE void clear_signs(const map *out, size_t pixel)
{
    if (out->type == BITS)
        memset(pixel_at(out, pixel), 0, out->pixel);
}

/* Quantize at most BLOCK values. NaN becomes the lowest level. Compilers make vectors of two comparisons in a row, but not
   of nested ones. */
INLINE void to_levels(const map *out, const float *values, int32_t *levels, int32_t count)
{
    float scale = out->scale, low = (float)(out->low - out->zero), high = (float)(out->high - out->zero);
    int32_t zero = out->zero, i;
    VECTORIZE
    for (i = 0; i < count; i++) {
        float level = values[i] / scale;
        level = level > low ? level : low;
        level = level > high ? high : level;
        levels[i] = (int32_t)((level + ROUNDER) - ROUNDER) + zero;
    }
}

INLINE void store_some(const map *out, uint8_t *at, int32_t channel, const float *values, int32_t count)
{
    int32_t i;
    if (out->type == FLOATS) {
        memcpy(at + (size_t)channel * sizeof(float), values, (size_t)count * sizeof(float));
    } else if (out->type == BYTES || out->type == INTS) {
        int32_t levels[BLOCK] LOCAL;
        to_levels(out, values, levels, count);
        if (out->type == INTS)
            memcpy(at + (size_t)channel * sizeof *levels, levels, (size_t)count * sizeof *levels);
        else
            for (i = 0; i < count; i++)
                at[channel + i] = (uint8_t)levels[i];
    } else {
        uint32_t signs = 0;
        for (i = 0; i < count; i++)
            signs |= (uint32_t)(values[i] >= 0.0f) << i;
        or_bits((word *)(void *)at, channel, signs, count);
    }
}

/* Apply functions to at most BLOCK values and store them; the signs of the pixel are clear. */
static void store_values(const map *out, size_t pixel, int32_t channel, float *values, int32_t count,
                         const step *steps, int32_t step_count)
{
    uint8_t *at = pixel_at(out, pixel);
    int32_t i;
    for (i = 0; i < step_count; i++)
        steps[i].apply(values, count, steps[i].a, steps[i].b);
    if (count == BLOCK) /* with a constant number, compilers make vectors */
        store_some(out, at, channel, values, BLOCK);
    else
        store_some(out, at, channel, values, count);
}
#endif
