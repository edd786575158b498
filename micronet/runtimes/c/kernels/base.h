/* Feature maps in one static arena, and what every kernel shares. All sums, conversions and roundings are defined to
   the last bit: compile without -ffast-math and the flags that are a part of it. */
#ifndef BASE_H
#define BASE_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__)
#error "compile without -ffast-math (-Ofast), which changes the scores"
#endif
#if defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error "compile without -funsafe-math-optimizations, -fassociative-math and -freciprocal-math: they change the scores"
#endif
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "compile without -ffinite-math-only, which changes the scores of NaN and infinity"
#endif
#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "floats must be rounded to 32 bits: add -msse2 -mfpmath=sse"
#endif
#if defined(__clang__) && __clang_major__ >= 12 /* it has no macro for -funsafe-math-optimizations and its parts */
#pragma clang fp reassociate(off)
#if __clang_major__ >= 18
#pragma clang fp reciprocal(off)
#elif defined(__SSE2__)
#pragma float_control(precise, on)
#endif
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__) && __GNUC__ >= 5
#pragma GCC optimize("fp-contract=off")
#endif

#if defined(__GNUC__)
#define MAY_ALIAS __attribute__((may_alias))
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))
#else
#define MAY_ALIAS
#define ALIGNED
#define INLINE static inline
#endif

/* Arrays on the stack. gcc 12 takes some for aligned that are not if AVX-512 is on, unless they are aligned explicitly. */
#if defined(__GNUC__) && defined(__AVX512F__)
#define LOCAL ALIGNED
#else
#define LOCAL
#endif

/* Before a short loop of a constant length, which gcc would unroll into single values before it makes vectors. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 8
#define VECTORIZE _Pragma("GCC unroll 1")
#else
#define VECTORIZE
#endif

#ifndef ARENA_BYTES
#define ARENA_BYTES 64
#endif

typedef uint64_t MAY_ALIAS word;
typedef float MAY_ALIAS f32;
typedef int32_t MAY_ALIAS i32;

enum { BITS, BYTES, INTS, FLOATS }; /* the type of a map: signs, uint8, int32, float */
enum { BLOCK = 16 };                 /* values that are converted at a time */

/* Rows of pixels of channels. Signs: bit c % 64 of word c / 64 of a pixel is 1 for +1. Integers: (q - zero) * scale. */
typedef struct {
    uint32_t place; /* in the arena, bytes */
    uint32_t pixel; /* bytes from one pixel to the next */
    int32_t rows, columns, channels;
    int32_t zero;
    float scale;
    uint8_t type;
    int32_t low, high; /* of integers */
} map;

/* An elementwise function that follows a layer. */
typedef struct {
    void (*apply)(float *values, int32_t count, float a, float b);
    float a, b;
} step;

static uint64_t arena[(ARENA_BYTES + 7) / 8] ALIGNED;

INLINE uint8_t *pixel_at(const map *x, size_t pixel)
{
    return (uint8_t *)arena + x->place + pixel * x->pixel;
}

INLINE size_t pixels_of(const map *x)
{
    return (size_t)x->rows * (size_t)x->columns;
}

INLINE int32_t bit_at(const word *bits, int32_t place)
{
    return (int32_t)((bits[place >> 6] >> (place & 63)) & 1);
}

INLINE void set_bit(word *bits, int32_t place)
{
    bits[place >> 6] |= (uint64_t)1 << (place & 63);
}

/* Set those of at most 32 bits, from a place on, that are 1. */
INLINE void or_bits(word *bits, int32_t place, uint32_t ones, int32_t count)
{
    int32_t shift = place & 63;
    bits[place >> 6] |= (uint64_t)ones << shift;
    if (shift + count > 64)
        bits[(place >> 6) + 1] |= (uint64_t)ones >> (64 - shift);
}

INLINE int32_t min_int(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

INLINE int32_t max_int(int32_t a, int32_t b)
{
    return a > b ? a : b;
}
#endif
