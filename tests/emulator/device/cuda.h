// CUDA's language for g++, included before every emulated kernel: qualifiers, built-in variables and functions. What the
// threads of a warp do together goes through `collective`; runtime.cpp runs them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("emulated_shared")))
#define __CUDA_ARCH__ 800

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

// Where in a kernel's source a call stands.
struct Place {
  const char* file;
  int line;
};
#define EMULATOR_HERE ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}

struct Thread {
  uint3 index;
  int lane;
};
// What runtime.cpp gives to the kernels.
#pragma GCC visibility push(default)
extern Thread* current;
extern unsigned char* dynamic_shared;
extern unsigned dynamic_shared_bytes;

// Ends the launch with an error that names the place.
[[noreturn]] void fail(Place place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Waits until all lanes of `mask` have called with the same `finish`; the last to come runs it on everyone's requests.
void collective(const char* name, Place place, unsigned mask, void* request, void (*finish)(void** requests, unsigned mask));

// Waits for all threads of the block that have not ended.
void barrier(Place place);

// Asynchronous copies of this thread: the destination holds NaN until its group has been waited for.
void copy_async(Place place, unsigned bytes, unsigned shared, const void* global, bool valid);
void commit_async();
void wait_async(int groups_in_flight);
#pragma GCC visibility pop

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Shuffle {
  unsigned long long sent, received;
  int source;  // lane that is read; negative: the own value
};
inline void finish_shuffle(void** requests, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Shuffle& mine = *static_cast<Shuffle*>(requests[lane]);
    // Of a lane outside the mask CUDA leaves the value undefined.
    const bool is_defined = mask >> mine.source & 1;
    mine.received = is_defined ? static_cast<Shuffle*>(requests[mine.source])->sent : ~0ull;
  }
}
template <class T>
inline T shuffle(const char* name, Place place, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Shuffle request = {0, 0, source};
  std::memcpy(&request.sent, &value, sizeof(T));
  collective(name, place, mask, &request, finish_shuffle);
  std::memcpy(&value, &request.received, sizeof(T));
  return value;
}

struct Vote {
  bool mine;
  unsigned all;
};
inline void finish_vote(void** requests, unsigned mask) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) all |= unsigned(static_cast<Vote*>(requests[lane])->mine) << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<Vote*>(requests[lane])->all = all;
}
inline unsigned vote(const char* name, Place place, unsigned mask, bool mine) {
  Vote request = {mine, 0};
  collective(name, place, mask, &request, finish_vote);
  return request.all;
}

inline void finish_nothing(void**, unsigned) {}

template <class Arguments>
inline void call(void (*kernel)(Arguments), const void* arguments) {
  kernel(*static_cast<const Arguments*>(arguments));
}
template <class Arguments>
constexpr int bytes_of(void (*)(Arguments)) {
  return sizeof(Arguments);
}

}  // namespace emulator

// The linker's bounds of all static shared variables; none where a kernel has none.
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

// What the host finds in a compiled kernel.
#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))
#define EMULATOR_KERNEL(name)                                                                             \
  EMULATOR_EXPORT void emulated_kernel(const void* arguments) { emulator::call(name, arguments); }         \
  EMULATOR_EXPORT int emulated_argument_bytes() { return emulator::bytes_of(name); }                       \
  EMULATOR_EXPORT unsigned char* emulated_shared_begin() { return __start_emulated_shared; }               \
  EMULATOR_EXPORT unsigned char* emulated_shared_end() { return __stop_emulated_shared; }

#define threadIdx (::emulator::current->index)
extern __attribute__((visibility("default"))) uint3 blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads(EMULATOR_HERE) { emulator::barrier(place); }
// Blocks run one after another, so that one variable serves all.
inline int __syncthreads_or(int mine, EMULATOR_HERE) {
  static int any;
  emulator::barrier(place);
  any = 0;
  emulator::barrier(place);
  if (mine) any = 1;
  emulator::barrier(place);
  return any;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_HERE) {
  emulator::collective("__syncwarp", place, mask, nullptr, emulator::finish_nothing);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane;
  return emulator::shuffle("__shfl_sync", place, mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane, source = lane ^ bits;
  const bool is_inside = source < (lane & ~(width - 1)) + width;
  return emulator::shuffle("__shfl_xor_sync", place, mask, value, is_inside ? source : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane, source = lane - delta;
  return emulator::shuffle("__shfl_up_sync", place, mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current->lane, source = lane + delta;
  return emulator::shuffle("__shfl_down_sync", place, mask, value, source <= (lane | (width - 1)) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool mine, EMULATOR_HERE) {
  return emulator::vote("__ballot_sync", place, mask, mine);
}
inline int __any_sync(unsigned mask, bool mine, EMULATOR_HERE) {
  return emulator::vote("__any_sync", place, mask, mine) != 0;
}
inline int __all_sync(unsigned mask, bool mine, EMULATOR_HERE) {
  return emulator::vote("__all_sync", place, mask, mine) == mask;
}

template <class T>
inline T __ldg(const T* from) {
  return *from;
}
inline unsigned __float_as_uint(float x) { return emulator::bits_of<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits_of<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_of<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_of<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
// Never contracted with a sum.
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// Threads change places only in collectives and barriers, so that these need no lock.
template <class T>
inline T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <class T>
inline T atomicMax(T* to, T value) {
  const T before = *to;
  *to = max(before, value);
  return before;
}

#include "intrinsics_emulated.h"
