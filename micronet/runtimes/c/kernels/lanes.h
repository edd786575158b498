/* Vectors of sums: 8 counts of differing bits, 16 integers, or 16 floats, in the registers of AVX-512, AVX2 or NEON, or as arrays. */
#ifndef LANES_H
#define LANES_H
#include "base.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { BIT_LANES = 8, LANES = 16 }; /* outputs that lie side by side in the weights of signs, and of int8 and floats */

INLINE int32_t ones_in(uint64_t x)
{
#if defined(__GNUC__) && (defined(__POPCNT__) || defined(__aarch64__))
    return __builtin_popcountll(x);
#else
    uint32_t low = (uint32_t)x, high = (uint32_t)(x >> 32);
    low -= (low >> 1) & 0x55555555u;
    high -= (high >> 1) & 0x55555555u;
    low = (low & 0x33333333u) + ((low >> 2) & 0x33333333u);
    high = (high & 0x33333333u) + ((high >> 2) & 0x33333333u);
    low = ((low + (low >> 4)) & 0x0f0f0f0fu) + ((high + (high >> 4)) & 0x0f0f0f0fu);
    return (int32_t)((low * 0x01010101u) >> 24);
#endif
}

/* a * b + c, rounded once. */
INLINE float fused(float a, float b, float c)
{
#if defined(__GNUC__) && (defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA))
    return __builtin_fmaf(a, b, c);
#else
    /* The product is exact in double. Their sum is rounded to odd, so that rounding it again to float is right. */
    double product = (double)a * (double)b, other = (double)c, sum = product + other, back = sum - product;
    double rest = (product - (sum - back)) + (other - back);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (rest < 0.0 || rest > 0.0) {
        if (!(bits & 1u))
            bits = (rest > 0.0) == (sum > 0.0) ? bits + 1u : bits - 1u;
        memcpy(&sum, &bits, sizeof sum);
    }
    return (float)sum;
#endif
}

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512VL__)
typedef __m512i counts;
#define NO_COUNTS _mm512_setzero_si512()
INLINE counts count_more(counts sum, uint64_t x, const uint64_t *weight)
{
    __m512i differing = _mm512_xor_si512(_mm512_loadu_si512(weight), _mm512_set1_epi64((int64_t)x));
    return _mm512_add_epi64(sum, _mm512_popcnt_epi64(differing));
}
INLINE counts count_masked(counts sum, uint64_t x, uint64_t mask, const uint64_t *weight)
{
    __m512i both = _mm512_set1_epi64((int64_t)x), seen = _mm512_set1_epi64((int64_t)mask);
    return _mm512_add_epi64( /* 0x28: (weight ^ both) & seen */
        sum, _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(_mm512_loadu_si512(weight), both, seen, 0x28)));
}
INLINE void store_counts(counts sum, int32_t *to)
{
    _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi64_epi32(sum));
}
#define HAVE_SIGNS_OF
INLINE uint32_t signs_of(counts sum, int32_t shift, int32_t valid, const int32_t *limits)
{
    __m256i least_valid = _mm256_add_epi32(_mm256_sll_epi32(_mm512_cvtepi64_epi32(sum), _mm_cvtsi32_si128(shift)),
                                           _mm256_loadu_si256((const __m256i *)(const void *)limits));
    return _mm256_cmple_epi32_mask(least_valid, _mm256_set1_epi32(valid));
}
#elif defined(__aarch64__)
typedef struct { uint16x8_t pairs[4]; } counts; /* 16-bit counts of two words each: at most 65535 per quarter */
#define NO_COUNTS {{vdupq_n_u16(0), vdupq_n_u16(0), vdupq_n_u16(0), vdupq_n_u16(0)}}
INLINE counts count_masked(counts sum, uint64_t x, uint64_t mask, const uint64_t *weight)
{
    uint64x2_t both = vdupq_n_u64(x), seen = vdupq_n_u64(mask);
    int32_t i;
    for (i = 0; i < 4; i++) {
        uint64x2_t differing = vandq_u64(veorq_u64(vld1q_u64(weight + 2 * i), both), seen);
        sum.pairs[i] = vpadalq_u8(sum.pairs[i], vcntq_u8(vreinterpretq_u8_u64(differing)));
    }
    return sum;
}
INLINE counts count_more(counts sum, uint64_t x, const uint64_t *weight)
{
    return count_masked(sum, x, ~(uint64_t)0, weight);
}
INLINE void store_counts(counts sum, int32_t *to)
{
    int32_t i;
    for (i = 0; i < 4; i++)
        vst1_s32(to + 2 * i, vreinterpret_s32_u32(vmovn_u64(vpaddlq_u32(vpaddlq_u16(sum.pairs[i])))));
}
#else
typedef struct { int32_t each[BIT_LANES]; } counts;
#define NO_COUNTS {{0}}
INLINE counts count_masked(counts sum, uint64_t x, uint64_t mask, const uint64_t *weight)
{
    int32_t i;
    for (i = 0; i < BIT_LANES; i++)
        sum.each[i] += ones_in((x ^ weight[i]) & mask);
    return sum;
}
INLINE counts count_more(counts sum, uint64_t x, const uint64_t *weight)
{
    return count_masked(sum, x, ~(uint64_t)0, weight);
}
INLINE void store_counts(counts sum, int32_t *to)
{
    memcpy(to, sum.each, sizeof sum.each);
}
#endif

#ifndef HAVE_SIGNS_OF
/* A bit for each of BIT_LANES outputs: 1 if the sum valid - (count << shift) reaches its limit. */
INLINE uint32_t signs_of(counts sum, int32_t shift, int32_t valid, const int32_t *limits)
{
    int32_t each[BIT_LANES] LOCAL, i;
    uint32_t signs = 0;
    store_counts(sum, each);
    for (i = 0; i < BIT_LANES; i++)
        signs |= (uint32_t)(valid - each[i] * (1 << shift) >= limits[i]) << i;
    return signs;
}
#endif

/* Sums of products of uint8 values and int8 weights, four of each at a time. weight: by output, value. */
#if defined(__AVX512VNNI__)
typedef __m512i dots;
#define NO_DOTS _mm512_setzero_si512()
INLINE dots add_products(dots sum, uint32_t four, const int8_t *weight)
{
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32((int32_t)four), _mm512_loadu_si512(weight));
}
INLINE void store_dots(dots sum, int32_t *to)
{
    _mm512_storeu_si512(to, sum);
}
#define HAVE_SOME_DOTS
INLINE dots add_some_products(dots sum, uint32_t four, const int8_t *weight, int32_t outputs)
{
    __mmask16 some = (__mmask16)((1u << outputs) - 1u);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32((int32_t)four), _mm512_maskz_loadu_epi32(some, weight));
}
#else
typedef struct { int32_t each[LANES]; } dots;
#define NO_DOTS {{0}}
INLINE dots add_products(dots sum, uint32_t four, const int8_t *weight)
{
    int32_t a = (int32_t)(four & 255), b = (int32_t)(four >> 8 & 255), c = (int32_t)(four >> 16 & 255), i;
    int32_t d = (int32_t)(four >> 24);
    for (i = 0; i < LANES; i++, weight += 4)
        sum.each[i] += a * weight[0] + b * weight[1] + c * weight[2] + d * weight[3];
    return sum;
}
INLINE void store_dots(dots sum, int32_t *to)
{
    memcpy(to, sum.each, sizeof sum.each);
}
#endif

#if defined(__AVX512F__)
typedef __m512 floats;
#define NO_FLOATS _mm512_setzero_ps()
INLINE floats multiply_add(floats sum, float x, const float *weight)
{
    return _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_loadu_ps(weight), sum);
}
INLINE void store_floats(floats sum, float *to)
{
    _mm512_storeu_ps(to, sum);
}
#define HAVE_SOME
INLINE floats multiply_add_some(floats sum, float x, const float *weight, int32_t count)
{
    __mmask16 some = (__mmask16)((1u << count) - 1u);
    return _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_maskz_loadu_ps(some, weight), sum);
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef struct { __m256 low, high; } floats;
#define NO_FLOATS {_mm256_setzero_ps(), _mm256_setzero_ps()}
INLINE floats multiply_add(floats sum, float x, const float *weight)
{
    __m256 both = _mm256_set1_ps(x);
    sum.low = _mm256_fmadd_ps(both, _mm256_loadu_ps(weight), sum.low);
    sum.high = _mm256_fmadd_ps(both, _mm256_loadu_ps(weight + 8), sum.high);
    return sum;
}
INLINE void store_floats(floats sum, float *to)
{
    _mm256_storeu_ps(to, sum.low);
    _mm256_storeu_ps(to + 8, sum.high);
}
#elif defined(__aarch64__)
typedef struct { float32x4_t quarters[4]; } floats;
#define NO_FLOATS {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}
INLINE floats multiply_add(floats sum, float x, const float *weight)
{
    int32_t i;
    for (i = 0; i < 4; i++)
        sum.quarters[i] = vfmaq_n_f32(sum.quarters[i], vld1q_f32(weight + 4 * i), x);
    return sum;
}
INLINE void store_floats(floats sum, float *to)
{
    int32_t i;
    for (i = 0; i < 4; i++)
        vst1q_f32(to + 4 * i, sum.quarters[i]);
}
#else
typedef struct { float each[LANES]; } floats;
#define NO_FLOATS {{0}}
INLINE floats multiply_add(floats sum, float x, const float *weight)
{
    int32_t i;
    for (i = 0; i < LANES; i++)
        sum.each[i] = fused(x, weight[i], sum.each[i]);
    return sum;
}
INLINE void store_floats(floats sum, float *to)
{
    memcpy(to, sum.each, sizeof sum.each);
}
#endif
#endif
