// out[key] = scale * sum over the queries whose window holds it of weights[query, slot of key] * x[query].
#include "gather.cuh"

extern "C" __global__ void NATRAIN_GEMM_BOUNDS
    natrain_gemm_inverse(const __grid_constant__ natrain::GatherArguments args) {
  natrain::gather(args);
}
