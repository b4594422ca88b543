// Products and matrix loads as they lie in the registers, for test_emulator.py to take apart.
#include "intrinsics.cuh"

using namespace natrain;

struct Arguments {
  const unsigned* a;  // [32 lanes, 4]
  const unsigned* b;  // [32, 2]
  float* d;           // [32, 4]
};

template <class Multiply>
__device__ void multiply(const Arguments& args, Multiply run) {
  unsigned a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = args.a[threadIdx.x * 4 + i], d[i] = args.d[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = args.b[threadIdx.x * 2 + i];
  run(d, a, b);
  for (int i = 0; i < 4; ++i) args.d[threadIdx.x * 4 + i] = d[i];
}

extern "C" __global__ void product_float16(const __grid_constant__ Arguments args) {
  multiply(args, [](auto& d, auto& a, auto& b) { mma_m16n8k16<float16>(d, a, b); });
}
extern "C" __global__ void product_bfloat16(const __grid_constant__ Arguments args) {
  multiply(args, [](auto& d, auto& a, auto& b) { mma_m16n8k16<bfloat16>(d, a, b); });
}
extern "C" __global__ void product_tf32(const __grid_constant__ Arguments args) {
  multiply(args, [](auto& d, auto& a, auto& b) { mma_m16n8k8_tf32(d, a, b); });
}

struct LoadArguments {
  const unsigned short* rows;  // [32, 8]: the row that each lane names
  unsigned* registers;         // [4 kinds, 32 lanes, 4]: x4, x4_trans, x2, x2_trans
};

extern "C" __global__ void load_matrices(const __grid_constant__ LoadArguments args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  const unsigned row = shared_address(shared) + lane * 16;
  cp_async_16(row, args.rows + lane * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  unsigned four[4], two[2];
  const auto keep = [&](int kind, const unsigned* registers, int count) {
    for (int i = 0; i < count; ++i) args.registers[(kind * 32 + lane) * 4 + i] = registers[i];
  };
  ldmatrix_x4(four, row);
  keep(0, four, 4);
  ldmatrix_x4_trans(four, row);
  keep(1, four, 4);
  ldmatrix_x2(two, row);
  keep(2, two, 2);
  ldmatrix_x2_trans(two, row);
  keep(3, two, 2);
}

struct ConvertArguments {
  const float* x;  // [count]
  unsigned* to;    // [4, count]: float16, bfloat16, tf32, and the float16 widened again
  int count;
};

extern "C" __global__ void convert(const __grid_constant__ ConvertArguments args) {
  for (int i = threadIdx.x; i < args.count; i += blockDim.x) {
    args.to[i] = pack<float16>(args.x[i], 0);
    args.to[args.count + i] = pack<bfloat16>(args.x[i], 0);
    args.to[2 * args.count + i] = to_tf32(args.x[i]);
    args.to[3 * args.count + i] = __float_as_uint(widen(narrow<float16>(args.x[i])));
  }
}
