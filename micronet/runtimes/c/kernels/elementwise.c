/* Operations on each value: conversions, sums and products of two maps, scales and biases, and what follows them. */
#include "load.c"
#include "values.c"

typedef struct {
    const float *scale, *bias; /* or null */
    const step *steps;
    int32_t step_count, multiply;
    int32_t scale_stride;      /* 0: one scale and bias for all channels */
} pointwise;

/* other: what is added or multiplied, or null; it may be of a single pixel. */
static void elementwise(const map *x, const map *other, const map *out, const pointwise *e)
{
    float values[BLOCK] LOCAL, others[BLOCK] LOCAL;
    size_t pixel, pixels = pixels_of(x);
    int32_t first, i;
    for (pixel = 0; pixel < pixels; pixel++) {
        clear_signs(out, pixel);
        for (first = 0; first < x->channels; first += BLOCK) {
            int32_t count = min_int(BLOCK, x->channels - first);
            load_values(x, pixel, first, values, count);
            if (other) {
                load_values(other, pixels_of(other) == 1 ? 0 : pixel, first, others, count);
                for (i = 0; i < count; i++)
                    values[i] = e->multiply ? values[i] * others[i] : values[i] + others[i];
            }
            if (e->scale)
                for (i = 0; i < count; i++) {
                    float scaled = values[i] * e->scale[(first + i) * e->scale_stride];
                    values[i] = scaled + e->bias[(first + i) * e->scale_stride];
                }
            store_values(out, pixel, first, values, count, e->steps, e->step_count);
        }
    }
}
