/* Convolutions and linear layers of floats: each sum begins at 0 and adds kernel rows, columns and channels in this
   order, each product and addition rounded once. Weights: by block of at most LANES outputs, value, output. */
#include "lanes.h"
#include "patch.c"

INLINE void sum_block(const f32 *const *windows, const float *weight, int32_t size, int32_t pixels,
                      float sums[][LANES])
{
    floats first = NO_FLOATS;
    int32_t i;
#if PIXELS > 1
    floats second = NO_FLOATS, third = NO_FLOATS, fourth = NO_FLOATS;
#endif
    for (i = 0; i < size; i++, weight += LANES) {
        first = multiply_add(first, windows[0][i], weight);
#if PIXELS > 1
        if (pixels > 1) {
            second = multiply_add(second, windows[1][i], weight);
            third = multiply_add(third, windows[2][i], weight);
            fourth = multiply_add(fourth, windows[3][i], weight);
        }
#endif
    }
    store_floats(first, sums[0]);
#if PIXELS > 1
    if (pixels > 1) {
        store_floats(second, sums[1]);
        store_floats(third, sums[2]);
        store_floats(fourth, sums[3]);
    }
#endif
    (void)pixels;
}

/* Two blocks at once keep the registers of wide processors busy. */
static void sum_blocks(const f32 *const *windows, const float *weight, int32_t size, float sums[][LANES],
                       float more[][LANES])
{
#if PIXELS > 1
    floats a = NO_FLOATS, b = NO_FLOATS, c = NO_FLOATS, d = NO_FLOATS;
    floats e = NO_FLOATS, f = NO_FLOATS, g = NO_FLOATS, h = NO_FLOATS;
    const float *next = weight + (size_t)size * LANES;
    int32_t i;
    for (i = 0; i < size; i++, weight += LANES, next += LANES) {
        a = multiply_add(a, windows[0][i], weight);
        b = multiply_add(b, windows[1][i], weight);
        c = multiply_add(c, windows[2][i], weight);
        d = multiply_add(d, windows[3][i], weight);
        e = multiply_add(e, windows[0][i], next);
        f = multiply_add(f, windows[1][i], next);
        g = multiply_add(g, windows[2][i], next);
        h = multiply_add(h, windows[3][i], next);
    }
    store_floats(a, sums[0]);
    store_floats(b, sums[1]);
    store_floats(c, sums[2]);
    store_floats(d, sums[3]);
    store_floats(e, more[0]);
    store_floats(f, more[1]);
    store_floats(g, more[2]);
    store_floats(h, more[3]);
#else
    sum_block(windows, weight, size, 1, sums);
    sum_block(windows, weight + (size_t)size * LANES, size, 1, more);
#endif
}

/* The sums of fewer than LANES outputs. */
static void sum_tail(const f32 *values, const float *weight, int32_t size, int32_t width, float *sums)
{
    int32_t i;
#ifdef HAVE_SOME
    floats some = NO_FLOATS;
    for (i = 0; i < size; i++, weight += width)
        some = multiply_add_some(some, values[i], weight, width);
    store_floats(some, sums);
#else
    int32_t o;
    for (o = 0; o < width; o++)
        sums[o] = 0.0f;
    for (i = 0; i < size; i++)
        for (o = 0; o < width; o++)
            sums[o] = fused(values[i], *weight++, sums[o]);
#endif
}

static void conv_floats(const map *x, const map *out, const layer *l)
{
    const f32 *windows[PIXELS] LOCAL = {NULL};
    float sums[PIXELS][LANES] LOCAL, more[PIXELS][LANES] LOCAL;
    int32_t row, column, group, first, p;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column += PIXELS) {
            int32_t pixels = min_int(PIXELS, out->columns - column);
            size_t start = (size_t)(row * out->columns + column);
            const float *weight = (const float *)l->weight;
            for (p = 0; p < pixels; p++)
                clear_signs(out, start + (size_t)p);
            for (group = 0; group < l->groups; group++) {
                for (p = 0; p < pixels; p++)
                    windows[p] = (const f32 *)patch_of(x, l, group, row, column + p, sizeof(float), 0,
                                                        (uint8_t *)patches[p]);
                for (first = 0; first < l->each; first += LANES) {
                    int32_t width = min_int(LANES, l->each - first);
                    if (l->each - first >= 2 * LANES && pixels == PIXELS) {
                        sum_blocks(windows, weight, l->size, sums, more);
                        for (p = 0; p < pixels; p++)
                            finish_floats(out, l, start + (size_t)p, group * l->each + first + LANES, more[p], LANES);
                        weight += (size_t)l->size * LANES;
                    } else if (width < LANES) {
                        for (p = 0; p < pixels; p++)
                            sum_tail(windows[p], weight, l->size, width, sums[p]);
                    } else if (PIXELS > 1 && pixels == PIXELS) {
                        sum_block(windows, weight, l->size, PIXELS, sums);
                    } else {
                        for (p = 0; p < pixels; p++)
                            sum_block(&windows[p], weight, l->size, 1, &sums[p]);
                    }
                    for (p = 0; p < pixels; p++)
                        finish_floats(out, l, start + (size_t)p, group * l->each + first, sums[p], width);
                    if (l->each - first >= 2 * LANES && pixels == PIXELS)
                        first += LANES;
                    weight += (size_t)l->size * (size_t)width;
                }
            }
        }
}
