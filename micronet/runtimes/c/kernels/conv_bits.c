/* Convolutions and linear layers of signs and binary or ternary weights, by counting the bits that differ.

   A window of K signs that differs from binary weights in d bits has the sum K - 2 d. Ternary weights are two planes of
   signs (>= 0 and > 0), whose counts are added: the sum is K - d. Outside the map, bits are masked and K is smaller.
   Weights: by group, block of at most BIT_LANES outputs, word, plane, output. */
#include "lanes.h"
#include "sums.c"
#include "patches.h"

typedef struct {
    const word *signs, *mask;
    int32_t valid; /* signs of the window that lie on the map */
} window;

/* Copy bits from ``start`` of a pixel to ``place`` of a window, which is 0 there. */
INLINE void append_bits(word *to, int32_t place, const word *from, int32_t start, int32_t count)
{
    from += start >> 6;
    start &= 63;
    while (count > 0) {
        int32_t part = min_int(64, count), shift = place & 63;
        uint64_t bits = *from++ >> start;
        if (start + part > 64)
            bits |= *from << (64 - start);
        if (part < 64)
            bits &= ((uint64_t)1 << part) - 1u;
        to[place >> 6] |= bits << shift;
        if (shift + part > 64)
            to[(place >> 6) + 1] |= bits >> (64 - shift);
        place += part;
        count -= part;
    }
}

INLINE void append_ones(word *to, int32_t place, int32_t count)
{
    while (count > 0) {
        int32_t shift = place & 63, part = min_int(64 - shift, count);
        to[place >> 6] |= (~(uint64_t)0 >> (64 - part)) << shift;
        place += part;
        count -= part;
    }
}

INLINE const word *signs_at(const map *x, int32_t row, int32_t column)
{
    return (const word *)(const void *)pixel_at(x, (size_t)(row * x->columns + column));
}

static window window_of(const map *x, const layer *l, int32_t group, int32_t row, int32_t column, int32_t words,
                        word *memory)
{
    int32_t top = row * l->stride_rows - l->pad_top, left = column * l->stride_columns - l->pad_left;
    int32_t bottom = top + (l->kernel_rows - 1) * l->dilation_rows, place, first, end, i, j;
    int32_t right = left + (l->kernel_columns - 1) * l->dilation_columns, start = group * l->inputs;
    int inside = top >= 0 && left >= 0 && bottom < x->rows && right < x->columns;
    window found LOCAL = {memory, NULL, 0};
    if (inside && l->size == l->inputs && (l->groups == 1 || l->inputs % 64 == 0)) {
        found.signs = signs_at(x, top, left) + start / 64;
        found.valid = l->size;
        return found;
    }
    memset(memory, 0, (size_t)words * (inside ? 8 : 16));
    found.mask = inside ? NULL : memory + words;
    first = left >= 0 ? 0 : (l->dilation_columns - 1 - left) / l->dilation_columns;
    end = right < x->columns ? l->kernel_columns : (x->columns - left + l->dilation_columns - 1) / l->dilation_columns;
    for (i = 0; i < l->kernel_rows && first < end; i++) {
        int32_t y = top + i * l->dilation_rows, count = (end - first) * l->inputs;
        place = (i * l->kernel_columns + first) * l->inputs;
        if (y < 0 || y >= x->rows)
            continue;
        found.valid += count;
        if (!inside)
            append_ones(memory + words, place, count);
        if (l->groups == 1 && l->dilation_columns == 1 && l->inputs % 64 == 0) {
            memcpy(memory + place / 64, signs_at(x, y, left + first), (size_t)count / 8);
            continue;
        }
        for (j = first; j < end; j++, place += l->inputs) {
            const word *pixel = signs_at(x, y, left + j * l->dilation_columns);
            if (l->groups == 1)
                append_bits(memory, place, pixel, 0, l->inputs);
            else
                append_bits(memory, place, pixel, start, l->inputs);
        }
    }
    return found;
}

INLINE counts count_at(counts sum, const window *one, int32_t i, int masked, const uint64_t *weight)
{
    return masked ? count_masked(sum, one->signs[i], one->mask[i], weight) : count_more(sum, one->signs[i], weight);
}

/* Count the bits in which ``pixels`` windows differ from BIT_LANES outputs' weights. */
INLINE void count_block(const window *windows, const word *weight, int32_t words, int32_t planes, int32_t pixels,
                        int masked, counts *found)
{
    counts first = NO_COUNTS;
    int32_t i, plane;
#if PIXELS > 1
    counts second = NO_COUNTS, third = NO_COUNTS, fourth = NO_COUNTS;
#endif
    for (i = 0; i < words; i++)
        for (plane = 0; plane < planes; plane++, weight += BIT_LANES) {
            const uint64_t *own = (const uint64_t *)weight;
            first = count_at(first, &windows[0], i, masked, own);
#if PIXELS > 1
            if (pixels > 1) {
                second = count_at(second, &windows[1], i, masked, own);
                third = count_at(third, &windows[2], i, masked, own);
                fourth = count_at(fourth, &windows[3], i, masked, own);
            }
#endif
        }
    found[0] = first;
#if PIXELS > 1
    if (pixels > 1) {
        found[1] = second;
        found[2] = third;
        found[3] = fourth;
    }
#endif
    (void)pixels;
}

INLINE void count_signs(const window *windows, const word *weight, int32_t words, int32_t planes, int32_t pixels,
                        int masked, counts *found)
{
    if (planes == 1 && !masked)
        count_block(windows, weight, words, 1, pixels, 0, found);
    else if (planes == 1)
        count_block(windows, weight, words, 1, pixels, 1, found);
    else if (!masked)
        count_block(windows, weight, words, 2, pixels, 0, found);
    else
        count_block(windows, weight, words, 2, pixels, 1, found);
}

/* The counts of fewer than BIT_LANES outputs. */
static void count_tail(const window *one, const word *weight, int32_t words, int32_t planes, int32_t width,
                       int32_t *differing)
{
    int32_t i, plane, o;
    memset(differing, 0, BIT_LANES * sizeof *differing);
    for (i = 0; i < words; i++)
        for (plane = 0; plane < planes; plane++)
            for (o = 0; o < width; o++)
                differing[o] += ones_in((one->signs[i] ^ *weight++) & (one->mask ? one->mask[i] : ~(uint64_t)0));
}

static void finish_counts(const map *out, const layer *l, size_t pixel, int32_t output, int32_t *differing,
                          int32_t valid, int32_t width)
{
    int32_t o;
    for (o = 0; o < width; o++)
        differing[o] = l->factor * (valid - (l->width == 1 ? 2 * differing[o] : differing[o]));
    finish_sums(out, l, pixel, output, differing, width);
}

/* Compute the outputs of a group for the windows of consecutive pixels. */
static void conv_signs(const map *out, const layer *l, const window *windows, int32_t pixels, int masked,
                       size_t pixel, int32_t group, const word *weight)
{
    const int32_t words = (l->size + 63) / 64, shift = l->width == 1;
    int32_t differing[BIT_LANES] LOCAL, limits[BIT_LANES] LOCAL, first, p;
    for (first = 0; first < l->each; first += BIT_LANES) {
        int32_t width = min_int(BIT_LANES, l->each - first), output = group * l->each + first;
        counts found[PIXELS] LOCAL;
        if (width < BIT_LANES) {
            for (p = 0; p < pixels; p++) {
                count_tail(&windows[p], weight, words, l->width, width, differing);
                finish_counts(out, l, pixel + (size_t)p, output, differing, windows[p].valid, width);
            }
        } else {
            if (PIXELS > 1 && pixels == PIXELS)
                count_signs(windows, weight, words, l->width, PIXELS, masked, found);
            else
                for (p = 0; p < pixels; p++)
                    count_signs(&windows[p], weight, words, l->width, 1, masked, &found[p]);
            if (l->limits)
                load_limits(l, output, BIT_LANES, limits);
            for (p = 0; p < pixels; p++) {
                if (l->limits) {
                    or_bits((word *)(void *)pixel_at(out, pixel + (size_t)p), output,
                            signs_of(found[p], shift, windows[p].valid, limits), BIT_LANES);
                } else {
                    store_counts(found[p], differing);
                    finish_counts(out, l, pixel + (size_t)p, output, differing, windows[p].valid, BIT_LANES);
                }
            }
        }
        weight += (size_t)words * (size_t)l->width * (size_t)width;
    }
}

static void conv_bits(const map *x, const map *out, const layer *l)
{
    const int32_t words = (l->size + 63) / 64;
    const size_t group_words = (size_t)words * (size_t)l->width * (size_t)l->each;
    window windows[PIXELS] LOCAL = {{NULL, NULL, 0}};
    int32_t row, column, group, p;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column += PIXELS) {
            int32_t pixels = min_int(PIXELS, out->columns - column);
            size_t pixel = (size_t)(row * out->columns + column);
            for (p = 0; p < pixels; p++)
                clear_signs(out, pixel + (size_t)p);
            for (group = 0; group < l->groups; group++) {
                int masked = 0;
                for (p = 0; p < pixels; p++) {
                    windows[p] = window_of(x, l, group, row, column + p, words, (word *)patches[p]);
                    masked |= windows[p].mask != NULL;
                }
                for (p = 0; masked && p < pixels; p++)
                    if (!windows[p].mask) { /* the others of the block have masks */
                        memset((word *)patches[p] + words, 255, (size_t)words * 8);
                        windows[p].mask = (word *)patches[p] + words;
                    }
                conv_signs(out, l, windows, pixels, masked, pixel, group,
                           (const word *)l->weight + (size_t)group * group_words);
            }
        }
}
