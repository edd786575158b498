/* A neural network as C99 code, written by micronet$what. No dependency but string.h, no heap.

   It needs $ram bytes of RAM (feature maps $arena, a window of a layer $patch; some more with -DPIXELS=4, the default
   where vector registers are wide) and $flash bytes of constants, and $depth of stack. Its memory is static: one
   prediction at a time.

   $scores_text
   The scores are exact to the last bit on every machine: a sum of floats begins at 0 and adds the products of the
   kernel's rows, columns and channels in this order, each rounded once. Every compiler flag keeps them so but
   -ffast-math and its parts (-funsafe-math-optimizations, -fassociative-math, -freciprocal-math, -ffinite-math-only),
   which are refused where the compiler has a macro for them. Compilers that do not define __GNUC__ need their flag like
   -fno-strict-aliasing: maps of several types share one memory. */
#ifndef MICRONET_MODEL_H
#define MICRONET_MODEL_H

#include <stdint.h>

#define MICRONET_ROWS $rows
#define MICRONET_COLUMNS $columns
#define MICRONET_CHANNELS $channels
#define MICRONET_SCORES $scores /* of all outputs together */
#define MICRONET_OUTPUTS $outputs
$output_lines
#define MICRONET_RAM_BYTES $ram
$scale_line
typedef $pixel micronet_pixel; /* $pixel_text */
typedef $score micronet_score;

enum { MICRONET_OK, MICRONET_NULL, MICRONET_IMAGE_SIZE, MICRONET_SCORES_SIZE };

#ifdef __cplusplus
extern "C" {
#endif

/* Compute the scores of an image: MICRONET_ROWS rows of MICRONET_COLUMNS pixels of MICRONET_CHANNELS values (RGBRGB...,
   the order of training). scores: MICRONET_SCORES values. Return MICRONET_OK, or MICRONET_NULL for a null pointer. */
int micronet_predict(const micronet_pixel *image, micronet_score *scores);

/* The same, after a check of the sizes: MICRONET_IMAGE_SIZE or MICRONET_SCORES_SIZE if one is wrong. */
int micronet_predict_checked(const micronet_pixel *image, int32_t rows, int32_t columns, int32_t channels,
                             micronet_score *scores, int32_t count);

$normalized#ifdef __cplusplus
}
#endif
#endif
