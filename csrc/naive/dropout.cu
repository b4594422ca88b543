// out = weights / (1 - p) where the slot is kept, else 0: linear in weights and its own transpose. The mask is a function
// of (seed, row, slot), the same one that every other kernel draws.
#include "dropout.h"
#include "weight_rows.cuh"

using namespace natrain;

struct Arguments {
  long long rows;     // ((image * tokens) + token) * heads + head, as the weights lie in memory
  long long tokens, heads;
  double keep_scale;  // 1 / (1 - p)
  unsigned long long threshold;
  const long long* seed;
  const Element* weights;
  Element* out;
};

extern "C" __global__ void __launch_bounds__(256) natrain_naive_dropout(const __grid_constant__ Arguments args) {
  const WeightRow at(args.rows);
  WeightVectors weights(args.weights, at);
  const long long head = at.row % args.heads, image_token = at.row / args.heads;
  const long long row = (image_token / args.tokens * args.heads + head) * args.tokens + image_token % args.tokens;
  const DropoutRow dropout(*args.seed, row);
#pragma unroll(UNROLL)
  for (int vector = 0; vector < VECTORS; ++vector) {
    const Acc(&weight)[WEIGHT_VECTOR] = weights[vector];
    Acc out[WEIGHT_VECTOR];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i) {
      const int slot = at.slot(vector, i);
      const bool is_kept = slot < NEIGHBORS && dropout.keeps(slot, unsigned(args.threshold));
      out[i] = is_kept ? weight[i] * Acc(args.keep_scale) : Acc(0);
    }
    at.store_vector(args.out, vector, out);
  }
}
