// Storage types and their conversion to and from Real, a row of head_dim at a time. Rounds to nearest even, as torch does.
#pragma once

#include "vector.h"

namespace natrain {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Real widen(Real x) { return x; }
inline Real widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline Real widen(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Exponent and mantissa move up by 13 bits; the product corrects the bias and normalises what was subnormal.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const float value = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(254 - 15) << 23);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  return bit_cast<float>(bit_cast<uint32_t>(value) | special | sign);
#endif
}

template <class E>
inline E narrow(Real x);
template <>
inline Real narrow<Real>(Real x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(Real x) {
  const uint32_t word = bit_cast<uint32_t>(float(x));
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return {uint16_t((word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}
template <>
inline float16 narrow<float16>(Real x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  uint32_t word = bit_cast<uint32_t>(float(x));
  const uint32_t sign = word & 0x80000000u;
  word ^= sign;
  uint32_t half;
  if (word >= 0x47800000u) {
    half = word > 0x7f800000u ? 0x7e00 : 0x7c00;
  } else if (word < 0x38800000u) {
    // Adding 0.5 makes the unit of the sum's mantissa that of a subnormal half.
    half = bit_cast<uint32_t>(bit_cast<float>(word) + 0.5f) - 0x3f000000u;
  } else {
    half = (word + 0xc8000fffu + ((word >> 13) & 1)) >> 13;
  }
  return {uint16_t(half | sign >> 16)};
#endif
}

// Hints: any address will do.
template <class E>
inline void prefetch_row(const E* row, int count) {
  for (int i = 0; i < count; i += 64 / int(sizeof(E))) __builtin_prefetch(row + i);
}

// A store to memory that is in no cache would hold up all stores after it.
template <class E>
inline void prefetch_row_to_write(const E* row, int count) {
  for (int i = 0; i < count; i += 64 / int(sizeof(E))) __builtin_prefetch(row + i, 1);
}

// `to` has room for whole vectors; what lies beyond `count` becomes 0.
template <class E>
inline void read_row(const E* from, int count, Real factor, Real* to) {
  int i = 0;
  if constexpr (sizeof(E) == sizeof(Real)) {
    for (; i + LANES <= count; i += LANES) store(to + i, load(reinterpret_cast<const Real*>(from) + i) * factor);
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2) {
    for (; i + 16 <= count; i += 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      __m512 wide;
      if constexpr (__is_same(E, float16)) {
        wide = _mm512_cvtph_ps(half);
      } else {
        wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      }
      _mm512_storeu_ps(reinterpret_cast<float*>(to + i), wide * float(factor));
    }
  }
#endif
  for (; i < count; ++i) to[i] = widen(from[i]) * factor;
  for (; i % LANES; ++i) to[i] = 0;
}

template <class E>
inline void write_row(E* to, int count, Real factor, const Real* from) {
  for (int i = 0; i < count; ++i) to[i] = narrow<E>(from[i] * factor);
}

}  // namespace natrain
