// out[query] = scale * sum over its neighbours of weights[query, slot] * x[key].
#include "gather.cuh"

extern "C" __global__ void NATRAIN_GEMM_BOUNDS
    natrain_gemm_av(const __grid_constant__ natrain::GatherArguments args) {
  natrain::gather(args);
}
