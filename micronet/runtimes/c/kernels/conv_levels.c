/* Convolutions and linear layers of uint8 values and weights of 1 to 8 bits: levels that lie densely in bytes. */
#include "patch.c"
#include "sums.c"

/* Return the sum of values times levels, eight of which take ``width`` bytes. */
INLINE int32_t sum_levels(const uint8_t *values, const uint8_t *levels, int32_t count, int32_t width)
{
    const uint32_t mask = (1u << width) - 1u;
    int32_t sum = 0, i, j;
    for (i = 0; i < count; i += 8, levels += width) {
        uint64_t eight = 0;
        int32_t left = min_int(8, count - i);
        for (j = 0; j < width; j++)
            eight |= (uint64_t)levels[j] << (8 * j);
        for (j = 0; j < left; j++)
            sum += values[i + j] * (int32_t)((uint32_t)(eight >> (j * width)) & mask);
    }
    return sum;
}

static int32_t sum_of_width(const uint8_t *values, const uint8_t *levels, int32_t count, int32_t width)
{
    switch (width) {
    case 1: return sum_levels(values, levels, count, 1);
    case 2: return sum_levels(values, levels, count, 2);
    case 4: return sum_levels(values, levels, count, 4);
    default: return sum_levels(values, levels, count, width);
    }
}

static void conv_levels(const map *x, const map *out, const layer *l)
{
    const size_t bytes = (size_t)((l->size + 7) / 8) * (size_t)l->width;
    int32_t sums[BLOCK] LOCAL, row, column, group, first, o;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            size_t pixel = (size_t)(row * out->columns + column);
            clear_signs(out, pixel);
            for (group = 0; group < l->groups; group++) {
                const uint8_t *window = patch_of(x, l, group, row, column, 1, x->zero, (uint8_t *)patches[0]);
                int32_t total = total_of(window, l->size);
                for (first = 0; first < l->each; first += BLOCK) {
                    int32_t count = min_int(BLOCK, l->each - first), output = group * l->each + first;
                    for (o = 0; o < count; o++) {
                        const uint8_t *levels = (const uint8_t *)l->weight + (size_t)(output + o) * bytes;
                        sums[o] = l->factor * sum_of_width(window, levels, l->size, l->width) + l->offset * total;
                    }
                    finish_sums(out, l, pixel, output, sums, count);
                }
            }
        }
}
