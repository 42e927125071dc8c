// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The vector type and what differs by instruction set; GCC's vector extensions do the rest. This header and those that
// build on it are compiled once for each variant. All they define is in an anonymous namespace, and they use nothing of the
// standard library: a shared inline function would be one symbol, and the linker could give the AVX-512 copy to all.
namespace gatedelta::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int64_t W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int64_t W = 8;
#else
constexpr int64_t W = 4;
#endif

#define GATEDELTA_INLINE inline __attribute__((always_inline))
// The hot loops: a function of their own, so that they have all registers.
#define GATEDELTA_KERNEL __attribute__((noinline))

// Before a loop of a constant count over registers.
#if defined(__clang__)
#define GATEDELTA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GATEDELTA_UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float v4 __attribute__((vector_size(16)));
// Pairs of double vectors hold one vector of floats.
typedef float vf_half __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 4)));

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

template <class T>
GATEDELTA_INLINE T load_as(const void* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
GATEDELTA_INLINE void store_as(void* p, T x) {
  __builtin_memcpy(p, &x, sizeof x);
}

GATEDELTA_INLINE vf set1(float x) { return x - vf{}; }

GATEDELTA_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

GATEDELTA_INLINE vf load(const float* p) { return load_as<vf>(p); }
GATEDELTA_INLINE void store(float* p, vf x) { store_as(p, x); }

#if !defined(__AVX2__)
/// 16-bit words to and from the lower halves of lanes.
GATEDELTA_INLINE vu load_words(const void* p) {
#if defined(__SSE2__)
  return (vu)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
#else
  return __builtin_convertvector(load_as<vh>(p), vu);
#endif
}
GATEDELTA_INLINE void store_words(void* p, vu x) {
#if defined(__SSE2__)
  // Sign-extended halves survive the saturation of the only pack there is.
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)x, 16), 16);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(extended, extended));
#else
  store_as(p, __builtin_convertvector(x, vh));
#endif
}
#endif

// The conversions are spelled out where GCC's own code for __builtin_convertvector takes more instructions.
GATEDELTA_INLINE vf load(const bf16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(load_words(p) << 16);
#endif
}

/// The upper halves of the result are the bfloat16, rounded to nearest even. NaN stays NaN (what is stored comes out of
/// arithmetic, so that it is a quiet one).
GATEDELTA_INLINE vu round_to_bf16(vf x) {
  const vu bits = (vu)x, half = ((bits >> 16) & 1u) + 0x7fffu;
#if defined(__AVX512F__)
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
  return (vu)_mm512_mask_add_epi32((__m512i)bits, number, (__m512i)bits, (__m512i)half);
#else
  return bits + (half & (vu)(x == x));
#endif
}

GATEDELTA_INLINE void store(bf16_t* p, vf x) {
  const vu bits = round_to_bf16(x) >> 16;
#if defined(__AVX512F__)
  store_as(p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  store_as(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  store_words(p, bits);
#endif
}

GATEDELTA_INLINE vf load(const f16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const vu half = load_words(p), magnitude = (half & 0x7fffu) << 13;
  const vf scaled = (vf)magnitude * 0x1p112f;                          // rebiases the exponent; exact for subnormals, too
  const vu special = (vu)((vi)magnitude >= 0x0f800000) & 0x7f800000u;  // infinity and NaN
  return (vf)((vu)scaled | special | ((half & 0x8000u) << 16));
#endif
}

GATEDELTA_INLINE void store(f16_t* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  // As to_float16() of gatedelta/dtype.hpp, on all lanes. Comparisons are signed: SSE2 has no others.
  const vu bits = (vu)x, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const vi infinite = vi{} + 0x47800000;  // 2^16; what rounds to it gets there by its carry
  const vu capped = (vu)((vi)magnitude > infinite ? infinite : (vi)magnitude);
  const vu normal = (capped - (0x38000000u - 0xfffu) + ((capped >> 13) & 1u)) >> 13;
  const vu subnormal = (vu)((vf)capped + 0.5f) - 0x3f000000u;
  const vu nan = (vu)((vi)magnitude > 0x7f800000) & (0x200u | ((magnitude >> 13) & 0x3ffu));
  store_words(p, ((vi)capped < 0x38800000 ? subnormal : normal) | nan | sign);
#endif
}

// Two vectors at once, in the order that is cheapest for the storage type: bfloat16 splits into the even and the odd elements
// with one instruction each. What they are multiplied with has to be in the same order: see arrange().
template <class S>
GATEDELTA_INLINE void load_pair(const S* p, vf& first, vf& second) {
  first = load(p);
  second = load(p + W);
}
template <class S>
GATEDELTA_INLINE void store_pair(S* p, vf first, vf second) {
  store(p, first);
  store(p + W, second);
}
GATEDELTA_INLINE void load_pair(const bf16_t* p, vf& even, vf& odd) {
  const vu bits = load_as<vu>(p);
  even = (vf)(bits << 16);
  odd = (vf)(bits & 0xffff0000u);
}
GATEDELTA_INLINE void store_pair(bf16_t* p, vf even, vf odd) {
  store_as(p, (round_to_bf16(even) >> 16) | (round_to_bf16(odd) & 0xffff0000u));
}

/// store_pair() for numbers (infinities included) and for the NaN that arithmetic makes of numbers, whose lower half is zero.
template <class S>
GATEDELTA_INLINE void store_pair_of_numbers(S* p, vf first, vf second) {
  store_pair(p, first, second);
}
/// All bits above the cut are put together, and all bits below; so one rounding does for both vectors. It goes up if the bits
/// below are more than a half, or a half above an odd number. No conversion instruction: that of AVX512-BF16 takes subnormal
/// numbers for zero.
GATEDELTA_INLINE void store_pair_of_numbers(bf16_t* p, vf even, vf odd) {
#if defined(__AVX512F__)
  constexpr int a_and_b_or_c = 0xea, a_and_not_b_or_c = 0xba;
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000), one = _mm512_set1_epi16(1), e = (__m512i)even, o = (__m512i)odd;
  const __m512i above = _mm512_ternarylogic_epi32(o, upper, _mm512_srli_epi32(e, 16), a_and_b_or_c);
  const __m512i below = _mm512_ternarylogic_epi32(e, upper, _mm512_slli_epi32(o, 16), a_and_not_b_or_c);
  const __mmask32 up =
      _mm512_cmpgt_epu16_mask(_mm512_ternarylogic_epi32(above, one, below, a_and_b_or_c), _mm512_set1_epi16((int16_t)0x8000));
  store_as(p, _mm512_mask_add_epi16(above, up, above, one));
#else
  typedef uint16_t words __attribute__((vector_size(W * 4)));
  const vu e = (vu)even, o = (vu)odd;
#if defined(__AVX2__)
  const words above = (words)_mm256_blend_epi16((__m256i)(e >> 16), (__m256i)o, 0xaa);
  const words below = (words)_mm256_blend_epi16((__m256i)e, (__m256i)(o << 16), 0xaa);
  const words less = (words)_mm256_subs_epu16((__m256i)below, (__m256i)(~above & 1));
#else
  const words above = (words)((e >> 16) | (o & 0xffff0000u));
  const words below = (words)((e & 0xffffu) | (o << 16));
#if defined(__SSE2__)
  const words less = (words)_mm_subs_epu16((__m128i)below, (__m128i)(~above & 1));
#else
  const words even_number = ~above & 1, less = below - (even_number & (words)(below != 0) & 1);
#endif
#endif
  store_as(p, above + (less >> 15));
#endif
}

/// `n` floats (a multiple of 2 W) brought into the order of load_pair.
template <class S>
GATEDELTA_INLINE void arrange(const S*, const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W) store(to + i, load(from + i));
}
GATEDELTA_INLINE void arrange(const bf16_t*, const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 2 * W) {
    const vf a = load(from + i), b = load(from + i + W);
#if defined(__AVX512F__)
    store(to + i, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    store(to + i + W, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
#elif defined(__AVX2__)
    store(to + i, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
    store(to + i + W, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
#else
    store(to + i, __builtin_shufflevector(a, b, 0, 2, 4, 6));
    store(to + i + W, __builtin_shufflevector(a, b, 1, 3, 5, 7));
#endif
  }
}

/// The sums of four vectors each. Pairs are added in the same order for each of them.
struct Sums {
  v4 a, b;
};
GATEDELTA_INLINE Sums reduce(const vf (&a)[4], const vf (&b)[4]) {
#if defined(__AVX512F__)
  const auto quarters = [](const vf(&x)[4]) {  // lane i of 128 bits: the four partial sums of x[i]
    const vf low = __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const vf high = __builtin_shufflevector(x[2], x[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(x[2], x[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  const vf x = quarters(a), y = quarters(b);
  const vf both = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const vf total = both + __builtin_shufflevector(both, both, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return {__builtin_shufflevector(total, total, 0, 4, 8, 12), __builtin_shufflevector(total, total, 2, 6, 10, 14)};
#else
  const auto sums = [](const vf(&x)[4]) {
    const auto fold = [](vf y) {
#if defined(__AVX2__)
      return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#else
      return y;
#endif
    };
    const v4 w = fold(x[0]), y = fold(x[1]), z = fold(x[2]), t = fold(x[3]);
    const v4 low = __builtin_shufflevector(w, y, 0, 4, 1, 5) + __builtin_shufflevector(w, y, 2, 6, 3, 7);
    const v4 high = __builtin_shufflevector(z, t, 0, 4, 1, 5) + __builtin_shufflevector(z, t, 2, 6, 3, 7);
    return __builtin_shufflevector(low, high, 0, 1, 4, 5) + __builtin_shufflevector(low, high, 2, 3, 6, 7);
  };
  return {sums(a), sums(b)};
#endif
}

GATEDELTA_INLINE vd widen_low(vf x) {
  vf_half half;
  __builtin_memcpy(&half, &x, sizeof half);
  return __builtin_convertvector(half, vd);
}
GATEDELTA_INLINE vd widen_high(vf x) {
  vf_half half;
  __builtin_memcpy(&half, (const char*)&x + sizeof half, sizeof half);
  return __builtin_convertvector(half, vd);
}
GATEDELTA_INLINE double sum(vd x) {
  double total = 0;
  for (int64_t i = 0; i < W / 2; ++i) total += x[i];
  return total;
}

/// e^x within 2 units in the last place over the whole range, subnormal results and infinity included.
/// Reduction and minimax polynomial after Muller et al., "Handbook of Floating-Point Arithmetic", chapter 10.
GATEDELTA_INLINE vf exponential(vf x) {
  vf y = (x > 89.0f) ? set1(89.0f) : x;
  y = (y < -105.0f) ? set1(-105.0f) : y;
  const vf shifter = set1(0x1.8p23f);
  const vf shifted = fma(y, set1(0x1.715476p+0f), shifter);  // rounds y / ln 2 to an integer in the low bits
  const vf n = shifted - shifter;
  vf r = fma(n, set1(-0x1.62e4p-1f), y);
  r = fma(n, set1(-0x1.7f7d1cp-20f), r);
  vf p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  // 2^n in two factors, so that both are normal numbers.
  const vi exponent = __builtin_convertvector(n, vi);
  const vi first = exponent >> 1, second = exponent - first;
  p = p * (vf)((first + 127) << 23) * (vf)((second + 127) << 23);
  return (x != x) ? x : p;
}

}  // namespace
}  // namespace gatedelta::cpu
