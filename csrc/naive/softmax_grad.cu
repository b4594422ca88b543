// d_scores = probs * (d_probs - sum(probs * d_probs) + d_lse) over rows of K weights; in place of d_probs if asked.
#include "weight_rows.cuh"

using namespace natrain;

struct Arguments {
  long long rows;
  const Element* probs;
  const Element* d_probs;
  const Acc* d_lse;   // null: no gradient comes through lse
  Element* d_scores;  // may be d_probs
};

extern "C" __global__ void __launch_bounds__(256) natrain_naive_softmax_grad(const __grid_constant__ Arguments args) {
  const WeightRow at(args.rows);
  WeightVectors probs(args.probs, at), d_probs(args.d_probs, at);

  Acc sum = 0;
#pragma unroll(UNROLL)
  for (int vector = 0; vector < VECTORS; ++vector) {
    const Acc(&prob)[WEIGHT_VECTOR] = probs[vector];
    const Acc(&d_prob)[WEIGHT_VECTOR] = d_probs[vector];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i)
      if (at.slot(vector, i) < NEIGHBORS) sum += prob[i] * d_prob[i];
  }
  sum = at.reduce(sum, [](Acc a, Acc b) { return a + b; });
  if (args.d_lse) sum -= args.d_lse[at.row];

#pragma unroll(UNROLL)
  for (int vector = 0; vector < VECTORS; ++vector) {
    const Acc(&prob)[WEIGHT_VECTOR] = probs[vector];
    const Acc(&d_prob)[WEIGHT_VECTOR] = d_probs[vector];
    Acc d_score[WEIGHT_VECTOR];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i)
      d_score[i] = at.slot(vector, i) < NEIGHBORS ? prob[i] * (d_prob[i] - sum) : Acc(0);
    at.store_vector(args.d_scores, vector, d_score);
  }
}
