/* Channel shuffles: (groups, channels of each) to (channels of each, groups). */
#include "base.h"

#if defined(__BMI2__) && defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__BMI2__) && defined(__x86_64__)
/* Words of 64 signs, each of 64 / groups signs of every group, if groups divides 64, and 64 the channels. */
static void shuffle_words(const word *from, word *to, int32_t groups, int32_t each)
{
    int32_t share = 64 / groups, count = groups * each / 64, group, i;
    uint64_t mask = 0;
    for (i = 0; i < 64; i += groups)
        mask |= (uint64_t)1 << i;
    for (i = 0; i < count; i++) {
        uint64_t bits = 0;
        for (group = 0; group < groups; group++) {
            int32_t start = group * each + i * share, offset = start & 63;
            uint64_t own = from[start >> 6] >> offset;
            if (offset + share > 64)
                own |= from[(start >> 6) + 1] << (64 - offset);
            bits |= _pdep_u64(own, mask << group);
        }
        to[i] = bits;
    }
}
#endif

static void shuffle_signs(const word *from, word *to, int32_t groups, int32_t each)
{
    uint64_t bits = 0;
    int32_t place = 0, group, i;
#if defined(__BMI2__) && defined(__x86_64__)
    if (64 % groups == 0 && groups * each % 64 == 0) {
        shuffle_words(from, to, groups, each);
        return;
    }
#endif
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
