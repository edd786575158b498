/* The image: pixels of 8 bits, (rows, columns, channels), are normalized. */
#include "values.c"

static void image_bytes(const uint8_t *image, const map *out, const float *scale, const float *shift,
                        const step *steps, int32_t step_count)
{
    float values[BLOCK] LOCAL;
    size_t pixel, pixels = pixels_of(out);
    int32_t first, i;
    for (pixel = 0; pixel < pixels; pixel++) {
        clear_signs(out, pixel);
        for (first = 0; first < out->channels; first += BLOCK) {
            int32_t count = min_int(BLOCK, out->channels - first);
            for (i = 0; i < count; i++, image++) {
                float scaled = (float)*image * scale[first + i];
                values[i] = scaled + shift[first + i];
            }
            store_values(out, pixel, first, values, count, steps, step_count);
        }
    }
}
