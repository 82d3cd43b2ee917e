// Vectors of numbers and the few functions of them that the kernels need, for every instruction set from one source.
//
// A translation unit is compiled once for each instruction set and number type (SELECTRA_REAL). Everything here is in
// an unnamed namespace and no library template is instantiated, so that the linker can never put code of a wider
// instruction set in the place of a narrower one's.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SELECTRA_INLINE static inline __attribute__((always_inline))
// What few calls or little of their time need: one copy, where the compiler would put one at every use.
#define SELECTRA_APART static __attribute__((noinline, unused))

namespace selectra {
namespace {

using Real = SELECTRA_REAL;
constexpr bool kIsFloat = std::is_same<Real, float>::value;
// The integer as wide as a Real: lanes of comparisons, and arithmetic on exponent bits.
using Bits = std::conditional<kIsFloat, int32_t, int64_t>::type;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(Real);

typedef Real Vector __attribute__((vector_size(kVectorBytes)));
typedef Bits BitVector __attribute__((vector_size(kVectorBytes)));

template <typename Number>
SELECTRA_INLINE Number smaller(Number a, Number b) {
  return b < a ? b : a;
}

template <typename Number>
SELECTRA_INLINE Number larger(Number a, Number b) {
  return a < b ? b : a;
}

SELECTRA_INLINE Vector broadcast(Real x) { return x - Vector{}; }

SELECTRA_INLINE Vector load(const Real* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

SELECTRA_INLINE void store(Real* to, Vector v) { memcpy(to, &v, sizeof v); }

#if defined(__AVX512F__)
SELECTRA_INLINE uint32_t first_lanes(int count) { return (1u << count) - 1u; }
#endif

// The first `count` numbers; the other lanes are zero and their memory is not touched.
SELECTRA_INLINE Vector load_some(const Real* from, int count) {
#if defined(__AVX512F__)
  if constexpr (kIsFloat) {
    return (Vector)_mm512_maskz_loadu_ps((__mmask16)first_lanes(count), from);
  } else {
    return (Vector)_mm512_maskz_loadu_pd((__mmask8)first_lanes(count), from);
  }
#else
  Vector v = {};
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}

SELECTRA_INLINE void store_some(Real* to, Vector v, int count) {
#if defined(__AVX512F__)
  if constexpr (kIsFloat) {
    _mm512_mask_storeu_ps(to, (__mmask16)first_lanes(count), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(to, (__mmask8)first_lanes(count), (__m512d)v);
  }
#else
  for (int i = 0; i < count; ++i) to[i] = v[i];
#endif
}

// bfloat16 is the upper half of a float: as many of them as a vector has lanes.
typedef uint16_t HalfVector __attribute__((vector_size(kLanes * 2)));
typedef uint32_t WordVector __attribute__((vector_size(kLanes * 4)));

SELECTRA_INLINE Vector widen_lanes(HalfVector half) {
  static_assert(sizeof(Vector) >= sizeof(WordVector), "");
  const WordVector bits = __builtin_convertvector(half, WordVector) << 16;
  Vector v = {};
  memcpy(&v, &bits, sizeof bits);
  return v;
}

// To the nearest, ties to even; a NaN stays one.
SELECTRA_INLINE HalfVector narrow_lanes(Vector v) {
  WordVector bits;
  memcpy(&bits, &v, sizeof bits);
  const WordVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVector magnitude = bits & 0x7fffffff;
  return __builtin_convertvector(magnitude > 0x7f800000 ? WordVector{} + 0x7fc0 : rounded, HalfVector);
}

// Lanes a0 b0 a1 b1 ... of the lower half (Half = 0) or the upper half (Half = 1) of a and b.
template <int Half, int... Lane>
SELECTRA_INLINE Vector interleave_lanes(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Half * (kLanes / 2) + Lane / 2 + (Lane % 2) * kLanes)...);
}

template <int Half>
SELECTRA_INLINE Vector interleave(Vector a, Vector b) {
  return interleave_lanes<Half>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Transposes kLanes vectors in place: log2(kLanes) perfect shuffles of rows i and i + kLanes / 2.
SELECTRA_INLINE void transpose(Vector (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vector shuffled[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      shuffled[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2]);
      shuffled[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
  }
}

// Lane i of the result is the sum of the lanes of rows[i]: the transposition with its additions folded in.
SELECTRA_INLINE Vector sum_lanes(const Vector* rows) {
  Vector partial[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) partial[i] = rows[i];
#pragma GCC unroll 8
  for (int half = kLanes / 2; half >= 1; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      partial[i] = interleave<0>(partial[i], partial[i + half]) + interleave<1>(partial[i], partial[i + half]);
    }
  }
  return partial[0];
}

// The larger lane; a NaN in x stays.
SELECTRA_INLINE Vector at_least(Vector x, Vector bound) {
#if defined(__AVX512F__)
  if constexpr (kIsFloat) return (Vector)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (kIsFloat) return (Vector)_mm256_max_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
  if constexpr (kIsFloat) return (Vector)_mm_max_ps((__m128)bound, (__m128)x);
#endif
  return x < bound ? bound : x;
}

// The smaller lane; a NaN in x stays.
SELECTRA_INLINE Vector at_most(Vector x, Vector bound) {
#if defined(__AVX512F__)
  if constexpr (kIsFloat) return (Vector)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (kIsFloat) return (Vector)_mm256_min_ps((__m256)bound, (__m256)x);
#elif defined(__SSE2__)
  if constexpr (kIsFloat) return (Vector)_mm_min_ps((__m128)bound, (__m128)x);
#endif
  return x > bound ? bound : x;
}

constexpr Bits kSignBit = Bits(1) << (8 * sizeof(Bits) - 2) << 1;

SELECTRA_INLINE Vector minus_magnitude(Vector x) { return (Vector)((BitVector)x | kSignBit); }

// 1 / x for normal x.
SELECTRA_INLINE Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  if constexpr (kIsFloat) {
    // 14 bits, and one step of Newton's.
    const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)x);
    return estimate + estimate * (1 - x * estimate);
  }
#endif
  return 1 / x;
}

constexpr double kLn2 = 0.693147180559945309417;
constexpr Real kLog2E = Real(1.44269504088896340736);

// 2^r = 1 + r (p[0] + r (p[1] + ...)) for |r| <= 1/2. The constant term is exactly 1, so that a step of zero decays
// nothing. float: degree 5, minimax in relative error (9.1e-8); double: Taylor, degree 13 (5e-18).
constexpr int kExp2Degree = kIsFloat ? 5 : 13;
struct Exp2Coefficients {
  Real p[kExp2Degree];
  constexpr Exp2Coefficients() : p() {
    if (kIsFloat) {
      constexpr double minimax[5] = {6.9314697760e-01, 2.4022242083e-01, 5.5507337445e-02, 9.6715127859e-03,
                                     1.3264727253e-03};
      for (int k = 0; k < 5; ++k) p[k] = Real(minimax[k]);
    } else {
      double power = 1;
      for (int k = 0; k < kExp2Degree; ++k) p[k] = Real(power *= kLn2 / (k + 1));
    }
  }
};
constexpr Exp2Coefficients kExp2;

SELECTRA_INLINE Vector exp2_of_fraction(Vector r) {
  Vector p = broadcast(kExp2.p[kExp2Degree - 1]);
#pragma GCC unroll 16
  for (int k = kExp2Degree - 2; k >= 0; --k) p = p * r + kExp2.p[k];
  return p * r + 1;
}

// 2^(x y), any exponent: 0 below the range; above it infinity (AVX-512) or the largest power of two.
SELECTRA_INLINE Vector exp2_of_product(Vector x, Vector y) {
#if defined(__AVX512F__)
  const Vector product = x * y;
  if constexpr (kIsFloat) {
    const Vector r = (Vector)_mm512_reduce_ps((__m512)product, 0);
    return (Vector)_mm512_scalef_ps((__m512)exp2_of_fraction(r), (__m512)(product - r));
  } else {
    const Vector r = (Vector)_mm512_reduce_pd((__m512d)product, 0);
    return (Vector)_mm512_scalef_pd((__m512d)exp2_of_fraction(r), (__m512d)(product - r));
  }
#else
  constexpr int kMantissaBits = kIsFloat ? 23 : 52;
  constexpr Real kLargest = kIsFloat ? 127 : 1023;
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits.
  constexpr Real kRounder = Real(1.5) * Real(Bits(1) << kMantissaBits);
  const Vector product = x * y;
  const Vector exponent = at_most(at_least(product, broadcast(1 - kLargest)), broadcast(kLargest));
  const Vector shifted = exponent + kRounder;
  const Vector r = exponent - (shifted - kRounder);
  const Vector power = (Vector)((BitVector)exp2_of_fraction(r) + ((BitVector)shifted << kMantissaBits));
  return product < 1 - kLargest ? Vector{} : power;
#endif
}

SELECTRA_INLINE Vector exp_of_negative(Vector x) { return exp2_of_product(x, broadcast(kLog2E)); }

struct Softplus {
  Vector value, slope;
};

// log(1 + exp(x)) and its derivative 1 / (1 + exp(-x)), to rounding in both tails:
// max(x, 0) + log1p(e) with e = exp(-|x|) and log1p(e) = 2 atanh(e / (2 + e)).
SELECTRA_INLINE Softplus softplus(Vector x) {
  // Terms of the series of 2 atanh; its argument is at most 1/3.
  constexpr int kTerms = kIsFloat ? 7 : 18;
  const Vector e = exp_of_negative(minus_magnitude(x));
  const Vector s = e * reciprocal(2 + e);
  const Vector square = s * s;
  Vector series = broadcast(Real(2.0 / (2 * kTerms - 1)));
#pragma GCC unroll 32
  for (int k = kTerms - 2; k >= 0; --k) series = series * square + Real(2.0 / (2 * k + 1));
  const Vector r = reciprocal(1 + e);
  return {at_least(x, Vector{}) + s * series, x >= 0 ? r : e * r};
}

SELECTRA_INLINE Vector sigmoid(Vector x) {
  const Vector e = exp_of_negative(minus_magnitude(x));
  const Vector r = reciprocal(1 + e);
  return x >= 0 ? r : e * r;
}

}  // namespace
}  // namespace selectra
