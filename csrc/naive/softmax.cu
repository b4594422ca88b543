// probs = softmax(scores) over rows of K weights, and the natural log of the sum of exponentials; in place if asked.
// The padding of a row is ignored and becomes 0.
#include "weight_rows.cuh"

using namespace natrain;

struct Arguments {
  long long rows;
  const Element* scores;
  Element* probs;  // may be scores
  Acc* lse;
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

extern "C" __global__ void __launch_bounds__(256) natrain_naive_softmax(const __grid_constant__ Arguments args) {
  const WeightRow at(args.rows);
  WeightVectors scores(args.scores, at);

  const Acc infinity = __int_as_float(0x7f800000);
  Acc largest = -infinity;
#pragma unroll(UNROLL)
  for (int vector = 0; vector < VECTORS; ++vector) {
    Acc(&score)[WEIGHT_VECTOR] = scores[vector];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i)
      if (at.slot(vector, i) < NEIGHBORS) largest = max(largest, score[i]);
  }
  largest = at.reduce(largest, [](Acc a, Acc b) { return max(a, b); });

  // As torch has it: an infinite score makes every probability a NaN and lse infinite.
  const bool is_infinite = largest == infinity || largest == -infinity;
  if (is_infinite) largest = 0;
  Acc sum = 0;
#pragma unroll(UNROLL)
  for (int vector = 0; vector < VECTORS; ++vector) {
    Acc(&score)[WEIGHT_VECTOR] = scores[vector];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i) {
      score[i] = at.slot(vector, i) < NEIGHBORS ? exponential(score[i] - largest) : Acc(0);
      sum += score[i];
    }
  }
  sum = at.reduce(sum, [](Acc a, Acc b) { return a + b; });

  const Acc inverse_sum = is_infinite ? Acc(__int_as_float(0x7fffffff)) : 1 / sum;
#pragma unroll(UNROLL)
  for (int vector = 0; vector < VECTORS; ++vector) {
    Acc(&score)[WEIGHT_VECTOR] = scores[vector];
    Acc prob[WEIGHT_VECTOR];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i) {
      const Acc weight = HELD ? score[i] : exponential(score[i] - largest);
      prob[i] = at.slot(vector, i) < NEIGHBORS ? weight * inverse_sum : Acc(0);
    }
    at.store_vector(args.probs, vector, prob);
  }
  if (at.is_active && at.lane == 0) args.lse[at.row] = largest + logarithm(sum);
}
