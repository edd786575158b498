/* Check the network with the image in test_vector.h. With the names of two files: predict the images in the first, one
   after the other as the type micronet_pixel, and write their scores to the second. */
#include <stdio.h>

#include "model.h"
#include "test_vector.h"

static micronet_score scores[MICRONET_SCORES];
static micronet_pixel image[(size_t)MICRONET_ROWS * MICRONET_COLUMNS * MICRONET_CHANNELS];

static int predict_file(const char *images, const char *results)
{
    FILE *from = fopen(images, "rb"), *to = fopen(results, "wb");
    if (!from || !to)
        return 2;
    while (fread(image, sizeof image, 1, from) == 1)
        if (micronet_predict(image, scores) || fwrite(scores, sizeof scores, 1, to) != 1)
            return 1;
    fclose(from);
    return fclose(to);
}

int main(int argc, char **argv)
{
    int32_t i;
    if (argc == 3)
        return predict_file(argv[1], argv[2]);
    if (micronet_predict_checked(test_image, MICRONET_ROWS, MICRONET_COLUMNS, MICRONET_CHANNELS, scores,
                                 MICRONET_SCORES))
        return 2;
    for (i = 0; i < MICRONET_SCORES; i++)
        if (scores[i] < test_scores[i] || scores[i] > test_scores[i]) {
            printf("score %ld is %.9g, but should be %.9g\n", (long)i, (double)scores[i], (double)test_scores[i]);
            return 1;
        }
    printf("ok\n");
    return 0;
}
