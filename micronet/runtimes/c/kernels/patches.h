/* Memory for the windows of output pixels. */
#ifndef PATCHES_H
#define PATCHES_H
#include "base.h"

/* PIXELS share the weights of a layer in registers; each needs PATCH_BYTES of memory for its window. */
#ifndef PIXELS
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__aarch64__)
#define PIXELS 4
#else
#define PIXELS 1
#endif
#endif
#ifndef PATCH_BYTES
#define PATCH_BYTES 64
#endif

static uint64_t patches[PIXELS][(PATCH_BYTES + 7) / 8] ALIGNED;
#endif
