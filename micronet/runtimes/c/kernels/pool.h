/* The windows of pools. */
#ifndef POOL_H
#define POOL_H
#include "base.h"

typedef struct {
    int32_t kernel_rows, kernel_columns, stride_rows, stride_columns, pad_top, pad_left, pad_bottom, pad_right;
    int32_t count_pads;
} pool;
#endif
