/* Written by micronet. The network's operations, one call each; see model.h. */
#include "model.h"

#define ARENA_BYTES $arena
#define PATCH_BYTES $patch
#include "kernels.h"
#include "weights.h"

/* place, pixel, rows, columns, channels, zero, scale, type, low, high */
static const map maps[$count] = {
$maps
};

$structs

static void predict_scores(micronet_score *scores)
{
$calls
}

int micronet_predict(const micronet_pixel *image, micronet_score *scores)
{
    if (!image || !scores)
        return MICRONET_NULL;
    $first_call
    predict_scores(scores);
    return MICRONET_OK;
}
$normalized
int micronet_predict_checked(const micronet_pixel *image, int32_t rows, int32_t columns, int32_t channels,
                             micronet_score *scores, int32_t count)
{
    if (rows != MICRONET_ROWS || columns != MICRONET_COLUMNS || channels != MICRONET_CHANNELS)
        return MICRONET_IMAGE_SIZE;
    if (count != MICRONET_SCORES)
        return MICRONET_SCORES_SIZE;
    return micronet_predict(image, scores);
}
