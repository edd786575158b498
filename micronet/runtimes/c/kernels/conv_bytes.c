/* Convolutions and linear layers of uint8 values and int8 weights, to which a centre of their output may be added.
   Weights: by group, block of at most LANES outputs, four values, output, value; zeros fill the last four. */
#include "lanes.h"
#include "patch.c"
#include "sums.c"

INLINE uint32_t four_of(const uint8_t *four)
{
    return (uint32_t)four[0] | (uint32_t)four[1] << 8 | (uint32_t)four[2] << 16 | (uint32_t)four[3] << 24;
}

/* The last values of a window, fewer than four. */
INLINE uint32_t rest_of(const uint8_t *values, int32_t size)
{
    uint8_t four[4] LOCAL = {0, 0, 0, 0};
    int32_t i;
    for (i = 0; i < (size & 3); i++)
        four[i] = values[(size & ~3) + i];
    return four_of(four);
}

INLINE void dot_block(const uint8_t *const *windows, const int8_t *weight, int32_t size, int32_t pixels,
                      int32_t sums[][LANES])
{
    dots first = NO_DOTS;
    int32_t i;
#if PIXELS > 1
    dots second = NO_DOTS, third = NO_DOTS, fourth = NO_DOTS;
#endif
    for (i = 0; i + 4 <= size; i += 4, weight += 4 * LANES) {
        first = add_products(first, four_of(windows[0] + i), weight);
#if PIXELS > 1
        if (pixels > 1) {
            second = add_products(second, four_of(windows[1] + i), weight);
            third = add_products(third, four_of(windows[2] + i), weight);
            fourth = add_products(fourth, four_of(windows[3] + i), weight);
        }
#endif
    }
    if (size & 3) {
        first = add_products(first, rest_of(windows[0], size), weight);
#if PIXELS > 1
        if (pixels > 1) {
            second = add_products(second, rest_of(windows[1], size), weight);
            third = add_products(third, rest_of(windows[2], size), weight);
            fourth = add_products(fourth, rest_of(windows[3], size), weight);
        }
#endif
    }
    store_dots(first, sums[0]);
#if PIXELS > 1
    if (pixels > 1) {
        store_dots(second, sums[1]);
        store_dots(third, sums[2]);
        store_dots(fourth, sums[3]);
    }
#endif
    (void)pixels;
}

/* The sums of fewer than LANES outputs. */
static void dot_tail(const uint8_t *values, const int8_t *weight, int32_t size, int32_t width, int32_t *sums)
{
    int32_t i;
#ifdef HAVE_SOME_DOTS
    dots some = NO_DOTS;
    for (i = 0; i + 4 <= size; i += 4, weight += 4 * width)
        some = add_some_products(some, four_of(values + i), weight, width);
    if (size & 3)
        some = add_some_products(some, rest_of(values, size), weight, width);
    store_dots(some, sums);
#else
    int32_t o, j;
    memset(sums, 0, LANES * sizeof *sums);
    for (i = 0; i < size; i += 4)
        for (o = 0; o < width; o++, weight += 4)
            for (j = 0; j < min_int(4, size - i); j++)
                sums[o] += values[i + j] * weight[j];
#endif
}

static void conv_bytes(const map *x, const map *out, const layer *l)
{
    const uint8_t *windows[PIXELS] LOCAL = {NULL};
    int32_t sums[PIXELS][LANES] LOCAL, totals[PIXELS] LOCAL = {0}, row, column, group, first, p, o;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column += PIXELS) {
            int32_t pixels = min_int(PIXELS, out->columns - column);
            size_t pixel = (size_t)(row * out->columns + column);
            const int8_t *weight = (const int8_t *)l->weight;
            for (p = 0; p < pixels; p++)
                clear_signs(out, pixel + (size_t)p);
            for (group = 0; group < l->groups; group++) {
                for (p = 0; p < pixels; p++) {
                    windows[p] = patch_of(x, l, group, row, column + p, 1, x->zero, (uint8_t *)patches[p]);
                    totals[p] = l->centre ? total_of(windows[p], l->size) : 0;
                }
                for (first = 0; first < l->each; first += LANES) {
                    int32_t width = min_int(LANES, l->each - first), output = group * l->each + first;
                    if (width < LANES)
                        for (p = 0; p < pixels; p++)
                            dot_tail(windows[p], weight, l->size, width, sums[p]);
                    else if (PIXELS > 1 && pixels == PIXELS)
                        dot_block(windows, weight, l->size, PIXELS, sums);
                    else
                        for (p = 0; p < pixels; p++)
                            dot_block(&windows[p], weight, l->size, 1, &sums[p]);
                    for (p = 0; p < pixels; p++) {
                        for (o = 0; l->centre && o < width; o++)
                            sums[p][o] += l->centre[output + o] * totals[p];
                        finish_sums(out, l, pixel + (size_t)p, output, sums[p], width);
                    }
                    weight += (size_t)((l->size + 3) / 4 * 4) * (size_t)width;
                }
            }
        }
}
