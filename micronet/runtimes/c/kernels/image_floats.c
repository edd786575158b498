/* The image: floats, (rows, columns, channels), already normalized. */
#include "values.c"

static void image_floats(const float *image, const map *out, const step *steps, int32_t step_count)
{
    float values[BLOCK] LOCAL;
    size_t pixel, pixels = pixels_of(out);
    int32_t first;
    for (pixel = 0; pixel < pixels; pixel++) {
        clear_signs(out, pixel);
        for (first = 0; first < out->channels; first += BLOCK) {
            int32_t count = min_int(BLOCK, out->channels - first);
            memcpy(values, image, (size_t)count * sizeof(float));
            image += count;
            store_values(out, pixel, first, values, count, steps, step_count);
        }
    }
}
