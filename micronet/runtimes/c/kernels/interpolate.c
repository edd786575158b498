/* Bilinear resizes: between two rows first, then between two columns of the result. */
#include "load.c"
#include "values.c"

typedef struct {
    const uint16_t *places; /* first rows, second rows, first columns, second columns */
    const float *shares;    /* of the second rows, then of the second columns */
    const step *steps;
    int32_t step_count;
} resize;

static void between_rows(const map *x, size_t above, size_t below, float share, int32_t channel, int32_t count,
                         float *values)
{
    float second[BLOCK] LOCAL, rest = 1.0f - share;
    int32_t i;
    load_values(x, above, channel, values, count);
    load_values(x, below, channel, second, count);
    for (i = 0; i < count; i++) {
        float first = values[i] * rest, other = second[i] * share;
        values[i] = first + other;
    }
}

static void interpolate(const map *x, const map *out, const resize *r)
{
    const uint16_t *left = r->places + 2 * out->rows, *right = left + out->columns;
    int32_t row, column, first, i;
    for (row = 0; row < out->rows; row++)
        for (column = 0; column < out->columns; column++) {
            int32_t above = r->places[row] * x->columns, below = r->places[out->rows + row] * x->columns;
            size_t pixel = (size_t)(row * out->columns + column);
            float share = r->shares[out->rows + column], rest = 1.0f - share;
            clear_signs(out, pixel);
            for (first = 0; first < x->channels; first += BLOCK) {
                int32_t count = min_int(BLOCK, x->channels - first);
                float values[BLOCK] LOCAL, second[BLOCK] LOCAL;
                between_rows(x, (size_t)(above + left[column]), (size_t)(below + left[column]), r->shares[row], first,
                             count, values);
                between_rows(x, (size_t)(above + right[column]), (size_t)(below + right[column]), r->shares[row],
                             first, count, second);
                for (i = 0; i < count; i++) {
                    float own = values[i] * rest, other = second[i] * share;
                    values[i] = own + other;
                }
                store_values(out, pixel, first, values, count, r->steps, r->step_count);
            }
        }
}
