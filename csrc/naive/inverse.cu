// out[key] = scale * sum over the queries whose window holds it of weights[query, slot of key] * x[query].
#include "gather.cuh"

extern "C" __global__ void __launch_bounds__(NATRAIN_THREADS, NATRAIN_MIN_BLOCKS)
    natrain_naive_inverse(const __grid_constant__ natrain::GatherArguments args) {
  natrain::gather<true>(args);
}
