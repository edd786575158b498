/* Channel shuffles: (groups, channels of each) to (channels of each, groups). */
#include "base.h"

static void shuffle(const map *x, const map *out, int32_t groups)
{
    size_t pixel, pixels = pixels_of(x);
    int32_t each = x->channels / groups, group, i;
    for (pixel = 0; pixel < pixels; pixel++) {
        const uint8_t *from = pixel_at(x, pixel);
        uint8_t *to = pixel_at(out, pixel);
        if (x->type == BITS)
            memset(to, 0, out->pixel);
        for (group = 0; group < groups; group++)
            for (i = 0; i < each; i++) {
                int32_t source = group * each + i, target = i * groups + group;
                if (x->type == BITS) {
                    word bit = (word)bit_at((const word *)(const void *)from, source);
                    ((word *)(void *)to)[target >> 6] |= bit << (target & 63);
                } else if (x->type == BYTES) {
                    to[target] = from[source];
                } else {
                    memcpy(to + 4 * target, from + 4 * source, 4);
                }
            }
    }
}
