// A reversal of 128 numbers through shared memory, and the mistakes that the emulator must not let pass.
#include "intrinsics.cuh"

using namespace natrain;

struct Arguments {
  const float* x;  // [128]
  float* out;      // [128]
};

template <bool HAS_BARRIER, bool HAS_WAIT>
__device__ void reverse(const Arguments& args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  if (i % 4 == 0) cp_async_16(shared_address(numbers + i), args.x + i, true);
  cp_async_commit();
  if (HAS_WAIT) cp_async_wait<0>();
  if (HAS_BARRIER) __syncthreads();
  args.out[i] = numbers[127 - i];
}

extern "C" __global__ void correct(const __grid_constant__ Arguments args) { reverse<true, true>(args); }
extern "C" __global__ void without_barrier(const __grid_constant__ Arguments args) { reverse<false, true>(args); }
extern "C" __global__ void without_wait(const __grid_constant__ Arguments args) { reverse<true, false>(args); }

extern "C" __global__ void static_shared(const __grid_constant__ Arguments args) {
  __shared__ float numbers[128];
  if (threadIdx.x != 5) numbers[threadIdx.x] = args.x[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = numbers[127 - threadIdx.x];
}

extern "C" __global__ void lanes_end_early(const __grid_constant__ Arguments args) {
  if (threadIdx.x % 32 >= 16) return;
  args.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, args.x[threadIdx.x], 1);
}

extern "C" __global__ void lanes_part(const __grid_constant__ Arguments args) {
  if (threadIdx.x % 2)
    args.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, args.x[threadIdx.x], 1);
  else
    __syncthreads();
}

extern "C" __global__ void past_the_end(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + 1] = args.x[threadIdx.x];
}

extern "C" __global__ void copy_past_the_end(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  cp_async_16(shared_address(shared) + 16 * threadIdx.x, args.x, true);
}

extern "C" __global__ void misaligned(const __grid_constant__ Arguments args) {
  const float4 four = *reinterpret_cast<const float4*>(args.x + 1);
  args.out[threadIdx.x] = four.x;
}

extern "C" __global__ void outside_an_array(const __grid_constant__ Arguments args) {
  float registers[4] = {1, 2, 3, 4};
  args.out[threadIdx.x] = registers[threadIdx.x / 16];
}
