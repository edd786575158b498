/* What layers with weights share: their windows, and what follows their sums. */
#ifndef LAYER_C
#define LAYER_C
#include "values.c"

typedef struct {
    const void *weight;
    const int32_t *base;     /* added to the integer sum of each output, or null */
    const int16_t *centre;   /* of each output, added to its weights, or null */
    const void *limits;      /* the smallest sum of each output that gives +1, or null */
    const float *scale;      /* of integer sums, or of float ones; null: 1 */
    const float *bias;       /* or null */
    const step *steps;       /* functions that follow */
    int32_t step_count;
    int32_t limit_bytes;     /* 2 or 4 */
    int32_t scale_stride;    /* 0: one scale for all outputs */
    int32_t factor, offset;  /* weight = offset + factor * stored level; of signs: factor * sign */
    int32_t width;           /* bits of a stored level, planes of signs, or bytes of a wide weight */
    int32_t groups, each;    /* groups of channels, and outputs of each */
    int32_t inputs;          /* of each group */
    int32_t size;            /* values of a window */
    int32_t kernel_rows, kernel_columns, stride_rows, stride_columns, dilation_rows, dilation_columns;
    int32_t pad_top, pad_left;
} layer;

INLINE void load_limits(const layer *l, int32_t output, int32_t count, int32_t *limits)
{
    const int16_t *narrow = (const int16_t *)l->limits;
    int32_t i;
    if (l->limit_bytes == 2)
        for (i = 0; i < count; i++)
            limits[i] = narrow[output + i];
    else
        memcpy(limits, (const int32_t *)l->limits + output, (size_t)count * sizeof *limits);
}

INLINE void scale_some(const layer *l, int32_t output, float *values, int32_t count)
{
    int32_t i;
    if (l->scale && l->scale_stride)
        for (i = 0; i < count; i++)
            values[i] = values[i] * l->scale[output + i];
    else if (l->scale)
        for (i = 0; i < count; i++)
            values[i] = values[i] * l->scale[0];
    if (l->bias)
        for (i = 0; i < count; i++)
            values[i] = values[i] + l->bias[output + i];
}

/* Turn at most BLOCK sums of floats, from an output on, into values of a pixel. */
static void finish_floats(const map *out, const layer *l, size_t pixel, int32_t output, float *values, int32_t count)
{
    if (count == BLOCK)
        scale_some(l, output, values, BLOCK);
    else
        scale_some(l, output, values, count);
    store_values(out, pixel, output, values, count, l->steps, l->step_count);
}
#endif
