// out[query] = sum over its neighbours of weights[query, slot] * v[key]; one group of lanes a query.
#include "problem.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;
  double scale;
  const Element* weights;
  const Element* v;
  Element* out;
  Layout weights_at, v_at, out_at;
};

extern "C" __global__ void natrain_naive_av(const __grid_constant__ Arguments args) {
  const Unit unit(args.geometry);
  const Neighbors neighbors(unit, args.geometry, args.v_at);
  const Element* v_image = unit.image(args.v, args.v_at);
  const Element* weights_row = unit.row(args.weights, args.weights_at);

  Acc out[VECTORS][VECTOR] = {};
#pragma unroll(UNROLL_NEIGHBORS)
  for (int chunk = 0; chunk < NEIGHBORS; chunk += WEIGHT_VECTOR) {
    Acc weights[WEIGHT_VECTOR];
    load<WEIGHT_VECTOR>(weights_row + chunk, weights);
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i) {
      const Slot slot(chunk + i);
      if (chunk + i < NEIGHBORS) {
        Acc v[VECTORS][VECTOR];
        load_row(v_image + neighbors.offset(slot), unit.lane, v);
        const Acc weight = neighbors.has(slot) ? weights[i] : Acc(0);
#pragma unroll
        for (int row = 0; row < VECTORS; ++row)
#pragma unroll
          for (int j = 0; j < VECTOR; ++j) out[row][j] += weight * v[row][j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) out[i][j] *= Acc(args.scale);
  if (unit.is_active) store_row(unit.row(args.out, args.out_at), unit.lane, out);
}
