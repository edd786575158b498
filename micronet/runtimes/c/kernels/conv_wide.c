/* Convolutions and linear layers of any integers, with sums of 64 bits: for values or weights of more than 8 bits. */
#include "layer.c"

INLINE int32_t level_at(const map *x, size_t pixel, int32_t channel)
{
    const uint8_t *at = pixel_at(x, pixel);
    if (x->type == BYTES)
        return (int32_t)at[channel] - x->zero;
    if (x->type == INTS)
        return ((const i32 *)(const void *)at)[channel] - x->zero;
    return bit_at((const word *)(const void *)at, channel) ? 1 : -1;
}

INLINE int32_t wide_weight(const layer *l, size_t place)
{
    return l->width == 1   ? ((const int8_t *)l->weight)[place]
           : l->width == 2 ? ((const int16_t *)l->weight)[place]
                           : ((const int32_t *)l->weight)[place];
}

static int64_t wide_sum(const map *x, const layer *l, int32_t output, int32_t top, int32_t left)
{
    size_t place = (size_t)output * (size_t)l->size;
    int32_t start = output / l->each * l->inputs, i, j, c;
    int64_t sum = 0;
    for (i = 0; i < l->kernel_rows; i++)
        for (j = 0; j < l->kernel_columns; j++) {
            int32_t y = top + i * l->dilation_rows, at = left + j * l->dilation_columns;
            if (y >= 0 && y < x->rows && at >= 0 && at < x->columns)
                for (c = 0; c < l->inputs; c++)
                    sum += (int64_t)wide_weight(l, place + (size_t)c)
                           * level_at(x, (size_t)(y * x->columns + at), start + c);
            place += (size_t)l->inputs;
        }
    return sum;
}

static void conv_wide(const map *x, const map *out, const layer *l)
{
    int32_t row, column, output;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            size_t pixel = (size_t)(row * out->columns + column);
            clear_signs(out, pixel);
            for (output = 0; output < out->channels; output++) {
                int64_t sum = wide_sum(x, l, output, row * l->stride_rows - l->pad_top,
                                       column * l->stride_columns - l->pad_left);
                float value = (float)(sum + (l->base ? l->base[output] : 0));
                int32_t limit = 0;
                if (l->limits)
                    load_limits(l, output, 1, &limit);
                if (!l->limits)
                    finish_floats(out, l, pixel, output, &value, 1);
                else if (sum >= limit)
                    set_bit((word *)(void *)pixel_at(out, pixel), output);
            }
        }
}
