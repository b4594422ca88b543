// out[key] = sum over the queries whose window holds it of weights[query, slot of key] * x[query]: the scatter of av,
// gathered, so that no atomics are needed and the result does not depend on the order of blocks.
#include "problem.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;
  double scale;
  const Element* weights;
  const Element* x;
  Element* out;
  Layout weights_at, x_at, out_at;
};

extern "C" __global__ void natrain_naive_inverse(const __grid_constant__ Arguments args) {
  const Geometry& g = args.geometry;
  const Unit unit(g);
  int first[3], last[3];
  Offset x_step[3], weights_step[3], x_origin = 0, weights_origin = 0;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const int k = kernel_size(axis), s = window_stride(axis);
    first[axis] = inverse_first(unit.position[axis], unit.group_length[axis], k, s, is_causal(axis));
    last[axis] = inverse_last(unit.position[axis], unit.group_length[axis], k, s, is_causal(axis));
    x_step[axis] = Offset(args.x_at.token[axis]) * g.dilation[axis];
    weights_step[axis] = Offset(args.weights_at.token[axis]) * g.dilation[axis];
    x_origin += Offset(args.x_at.token[axis]) * unit.group[axis];
    weights_origin += Offset(args.weights_at.token[axis]) * unit.group[axis];
  }
  const Element* x_image = unit.image(args.x, args.x_at) + x_origin;
  const Element* weights_image = unit.image(args.weights, args.weights_at) + weights_origin;
  const auto slot_of = [&](int axis, int query) {
    return unit.position[axis] -
           window_start(query, unit.group_length[axis], kernel_size(axis), window_stride(axis), is_causal(axis));
  };

  Acc out[VECTORS][VECTOR] = {};
  for (int z = first[0]; z <= last[0]; ++z) {
    const int slot_z = slot_of(0, z) * kernel_size(1);
    for (int y = first[1]; y <= last[1]; ++y) {
      const int slot_y = (slot_z + slot_of(1, y)) * kernel_size(2);
      const Element* x_row = x_image + (x_step[0] * z + x_step[1] * y);
      const Element* weights_row = weights_image + (weights_step[0] * z + weights_step[1] * y + slot_y);
#pragma unroll 4
      for (int column = first[2]; column <= last[2]; ++column) {
        const Acc weight = widen(weights_row[weights_step[2] * column + slot_of(2, column)]);
        Acc x[VECTORS][VECTOR];
        load_row(x_row + x_step[2] * column, unit.lane, x);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
          for (int j = 0; j < VECTOR; ++j) out[i][j] += weight * x[i][j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) out[i][j] *= Acc(args.scale);
  if (unit.is_active) store_row(unit.row(args.out, args.out_at), unit.lane, out);
}
