/* Powers of two, of which exponential functions are made. */
#ifndef POWER_C
#define POWER_C
#include "values.c"

/* 2 to the power of a whole number from -126 to 127. */
INLINE float power_of_two(float x)
{
    uint32_t bits = (uint32_t)((int32_t)x + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}
#endif
