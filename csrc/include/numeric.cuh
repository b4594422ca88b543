// Storage types, their accumulators, and vector access, without cuda_fp16.h: that header costs more compile time than a
// kernel here, and NVRTC may have no toolkit to find it in.
#pragma once

namespace natrain {

struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// Conversions that are one instruction. With NATRAIN_EMULATED a host compiler has them from a header of the tests.
#ifndef NATRAIN_EMULATED
__device__ __forceinline__ float widen_bits(unsigned short bits, const float16*) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
}
__device__ __forceinline__ void widen_pair(unsigned word, float16*, float& low, float& high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(low), "=f"(high) : "r"(word));
}
__device__ __forceinline__ unsigned short narrow_bits(float x, const float16*) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ unsigned short narrow_bits(float x, const bfloat16*) {
#if __CUDA_ARCH__ >= 800
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const unsigned word = __float_as_uint(x);
  const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? 0x7fff : (unsigned short)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
#endif
}
#endif

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) { return widen_bits(x.bits, (const float16*)nullptr); }

// Rounds to nearest even, as torch does.
template <class T>
__device__ __forceinline__ T narrow(typename Accumulator<T>::type x);

template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
  return {narrow_bits(x, (const float16*)nullptr)};
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
  return {narrow_bits(x, (const bfloat16*)nullptr)};
}

// The unsigned word that one access of BYTES moves.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Two 16-bit values out of the word that holds them; spelt on words, since the compiler splits the word first otherwise.
__device__ __forceinline__ void widen_pair(unsigned word, bfloat16*, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

// N values moved by one instruction; `from` and `to` must be aligned to N * sizeof(T) bytes, at most 16.
template <int N, class T, bool READ_ONLY = true>
__device__ __forceinline__ void load(const T* from, typename Accumulator<T>::type (&to)[N]) {
  using W = typename Word<N * sizeof(T)>::type;
  union {
    W word;
    T values[N];
    unsigned words[sizeof(W) < 4 ? 1 : sizeof(W) / 4];
  } access;
  access.word = READ_ONLY ? __ldg(reinterpret_cast<const W*>(from)) : *reinterpret_cast<const W*>(from);
  if constexpr (sizeof(T) == 2 && N > 1) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) widen_pair(access.words[i], (T*)nullptr, to[2 * i], to[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(access.values[i]);
  }
}

// Of memory that this kernel also writes, which the read-only path must not see.
template <int N, class T>
__device__ __forceinline__ void load_mutable(const T* from, typename Accumulator<T>::type (&to)[N]) {
  load<N, T, false>(from, to);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const typename Accumulator<T>::type (&from)[N]) {
  using W = typename Word<N * sizeof(T)>::type;
  union {
    W word;
    T values[N];
  } access;
#pragma unroll
  for (int i = 0; i < N; ++i) access.values[i] = narrow<T>(from[i]);
  *reinterpret_cast<W*>(to) = access.word;
}

}  // namespace natrain
