// The widest vector of the processor compiled for, through GCC's vector extension: AVX-512, AVX2, or 16 bytes anywhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef NATRAIN_REAL
#error "NATRAIN_REAL must be float or double: the type of every sum"
#endif

namespace natrain {

using Real = NATRAIN_REAL;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / sizeof(Real);

// How many vector registers products may block for: queries by key vectors, queries by vectors of head_dim.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int QUERY_BLOCK = 6, KEY_VECTORS = 4, DIM_VECTORS = 2;
#else
constexpr int QUERY_BLOCK = 4, KEY_VECTORS = 2, DIM_VECTORS = 2;
#endif

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
using Bits = BitsOf<Real>::type;

typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef Bits BitVector __attribute__((vector_size(VECTOR_BYTES)));
typedef Real UnalignedVector __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(Real)), may_alias));

inline Vector load(const Real* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline void store(Real* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }
inline Vector broadcast(Real value) { return value - Vector{}; }

// Two half vectors, one behind the other: two narrow rows of keys share a vector where halves load at full speed.
#if defined(__AVX512F__)
constexpr bool HAS_PAIRS = LANES == 16;
inline Vector load_pair(const Real* low, const Real* high) {
  const auto both = _mm512_castpd256_pd512(_mm256_loadu_pd(reinterpret_cast<const double*>(low)));
  return (Vector)_mm512_insertf64x4(both, _mm256_loadu_pd(reinterpret_cast<const double*>(high)), 1);
}
#else
constexpr bool HAS_PAIRS = false;
inline Vector load_pair(const Real* low, const Real*) { return load(low); }
#endif

// Bit i of `mask` chooses lane i of `yes`, else of `no`.
inline Vector select(unsigned mask, Vector yes, Vector no) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) return (Vector)_mm512_mask_blend_ps(mask, (__m512)no, (__m512)yes);
  return (Vector)_mm512_mask_blend_pd(mask, (__m512d)no, (__m512d)yes);
#else
  BitVector lane;
  for (int i = 0; i < LANES; ++i) lane[i] = Bits(1) << i;
  return ((Bits(mask) - BitVector{}) & lane) != 0 ? yes : no;
#endif
}

// Lanes [first, past) of a vector.
inline unsigned lane_range(int first, int past) {
  const auto below = [](int lane) { return lane <= 0 ? 0u : lane >= LANES ? (1u << LANES) - 1 : (1u << lane) - 1; };
  return below(past) & ~below(first);
}

inline Real sum_lanes(Vector v) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) return _mm512_reduce_add_ps((__m512)v);
  return _mm512_reduce_add_pd((__m512d)v);
#else
  Real sum = v[0];
  for (int i = 1; i < LANES; ++i) sum += v[i];
  return sum;
#endif
}

inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

inline Real max_lanes(Vector v) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) return _mm512_reduce_max_ps((__m512)v);
  return _mm512_reduce_max_pd((__m512d)v);
#else
  Real most = v[0];
  for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

template <class V>
inline V shuffle(V a, V b, BitVector index) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < LANES; ++i) out[i] = index[i] < LANES ? a[index[i]] : b[index[i] - LANES];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Rows become columns, in place.
inline void transpose(Vector (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    BitVector upper, lower;
    for (int lane = 0; lane < LANES; ++lane) {
      upper[lane] = lane & step ? LANES + lane - step : lane;
      lower[lane] = lane & step ? LANES + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const Vector a = rows[i], b = rows[i + step];
      rows[i] = shuffle(a, b, upper);
      rows[i + step] = shuffle(a, b, lower);
    }
  }
}

// e^x for x <= 88 (float) or 709 (double); 0 below the smallest normal number; NaN stays NaN. Error: at most 1.5 units in
// the last place over the range. x = n ln 2 + r, |r| <= ln(2) / 2; n is read from the low bits of x / ln 2 + `magic`.
inline Vector exponential(Vector x) {
  constexpr bool single = sizeof(Real) == 4;
  constexpr Real lowest = single ? -87.33654f : -708.39641853226408;
  constexpr Real magic = single ? 12582912.0f : 6755399441055744.0;
  constexpr Real ln2_high = single ? 0.693359375f : 6.93145751953125e-1;
  constexpr Real ln2_low = single ? -2.12194440e-4f : 1.42860682030941723212e-6;
  constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
  const Vector shifted = x * Real(1.4426950408889634074) + magic;
  const Vector n = shifted - magic;
  const Vector r = (x - n * ln2_high) - n * ln2_low;
  Vector power;
  if constexpr (single) {
    // Cephes expf.
    power = r * 1.9875691500e-4f + 1.3981999507e-3f;
    power = power * r + 8.3334519073e-3f;
    power = power * r + 4.1665795894e-2f;
    power = power * r + 1.6666665459e-1f;
    power = power * r + 5.0000001201e-1f;
    power = power * (r * r) + r + 1.0f;
  } else {
    // Taylor to r^13: the next term is below 2^-57.
    constexpr double inverse_factorial[] = {1.6059043836821613e-10, 2.08767569878681e-9,   2.505210838544172e-8,
                                            2.755731922398589e-7,   2.7557319223985893e-6, 2.48015873015873e-5,
                                            1.984126984126984e-4,   1.388888888888889e-3,  8.333333333333333e-3,
                                            4.1666666666666664e-2,  1.6666666666666666e-1, 0.5};
    power = broadcast(Real(inverse_factorial[0]));
    for (int i = 1; i < 12; ++i) power = power * r + Real(inverse_factorial[i]);
    power = power * (r * r) + r + Real(1);
  }
  const BitVector exponent = ((BitVector)shifted + bias) << mantissa;
  return x < lowest ? Vector{} : power * (Vector)exponent;
}

}  // namespace natrain
