/* Channel shuffles: (groups, channels of each) to (channels of each, groups). */
#include "base.h"

static void shuffle_signs(const word *from, word *to, int32_t groups, int32_t each)
{
    uint64_t bits = 0;
    int32_t place = 0, group, i;
    for (i = 0; i < each; i++)
        for (group = 0; group < groups; group++) {
            bits |= (uint64_t)bit_at(from, group * each + i) << place;
            if (++place == 64) {
                *to++ = bits;
                bits = 0;
                place = 0;
            }
        }
    if (place)
        *to = bits;
}

static void shuffle(const map *x, const map *out, int32_t groups)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t each = x->channels / groups, group, i;
    for (pixel = 0; pixel < pixels; pixel++) {
        const uint8_t *from = pixel_at(x, pixel);
        uint8_t *to = pixel_at(out, pixel);
        if (x->type == BITS) {
            shuffle_signs((const word *)(const void *)from, (word *)(void *)to, groups, each);
            continue;
        }
        for (group = 0; group < groups; group++)
            for (i = 0; i < each; i++) {
                int32_t source = group * each + i, target = i * groups + group;
                if (x->type == BYTES)
                    to[target] = from[source];
                else
                    memcpy(to + 4 * target, from + 4 * source, 4);
            }
    }
}
