// The weighted sums of both directions: out[position] = scale * sum over what it reaches of weight * row of x.
// av: a query reaches its keys, and its own row of weights holds their slots. inverse: a key reaches the queries whose
// window holds it, and each of their rows holds the key's slot; gathered so, the scatter of av needs no atomics, and
// its result does not depend on the order of blocks.
#pragma once

#include "problem.cuh"

namespace natrain {

struct GatherArguments {
  Geometry geometry;
  double scale;
  const Element* weights;
  const Element* x;
  Element* out;
  Layout weights_at, x_at, out_at;
};

__device__ __forceinline__ int start_of_window(int axis, int position, int group_length) {
  return window_start(position, group_length, kernel_size(axis), window_stride(axis), is_causal(axis));
}

// A position that does not reach a column of its unit takes it with weight 0, or, CAREFUL, leaves it out: 0 times a NaN
// is a NaN.
template <bool INVERSE, bool CAREFUL>
__device__ __forceinline__ void accumulate(const GatherArguments& args, const Unit& unit, const Reach& reach,
                                           Acc (&out)[POSITIONS][VECTORS][VECTOR]) {
  constexpr int KY = kernel_size(1), KX = kernel_size(2);
  constexpr int ROWS = INVERSE || CAREFUL ? 1 : UNROLL_ROWS, CHUNKS = INVERSE || CAREFUL ? 1 : UNROLL_CHUNKS;
  const Step x_step(args.geometry, args.x_at), weights_step(args.geometry, args.weights_at);
  const Element* x_origin = unit.group_origin(args.x, args.x_at);
  const Element* weights = unit.group_origin(args.weights, args.weights_at);
  const int z0 = unit.position[0], y0 = unit.position[1];
  const int planes = INVERSE || is_causal(0) ? reach.turns(0) : kernel_size(0);
  const int rows = INVERSE || is_causal(1) ? reach.turns(1) : KY;
  const int columns = INVERSE ? reach.turns(2) : COLUMNS;

  for (int plane = 0; plane < planes; ++plane) {
#pragma unroll(ROWS)
    for (int row = 0; row < rows; ++row) {
      const int z = min(reach.first[0] + plane, reach.last[0]), y = min(reach.first[1] + row, reach.last[1]);
      // Another unit of the warp reaches further.
      const bool is_past = reach.first[0] + plane > reach.last[0] || reach.first[1] + row > reach.last[1];
      const Element* x_row = x_origin + x_step.to(z, y, 0);
      const int slot_z = INVERSE ? z0 - start_of_window(0, z, unit.group_length[0]) : plane;
      const int slot_y = INVERSE ? y0 - start_of_window(1, y, unit.group_length[1]) : row;
      const Element* weights_row =
          weights + (weights_step.to(INVERSE ? z : z0, INVERSE ? y : y0, 0) + (slot_z * KY + slot_y) * KX);
#pragma unroll(CHUNKS)
      for (int chunk = 0; chunk < columns; chunk += LANES) {
        // Every lane fetches the weights of one column, and all lanes of the unit use them.
        const int own_column = reach.first[2] + chunk + unit.lane;
        Acc own[POSITIONS];
#pragma unroll
        for (int i = 0; i < POSITIONS; ++i) {
          const int from = INVERSE ? own_column : unit.x(i);
          const int slot = INVERSE ? unit.x(i) - start_of_window(2, own_column, unit.group_length[2])
                                   : own_column - reach.x_first[i];
          own[i] = !is_past && reach.holds(i, own_column) ? widen(weights_row[weights_step.x * from + slot]) : Acc(0);
        }
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
          const int column = reach.first[2] + chunk + lane;
          Acc x[VECTORS][VECTOR];
          load_row(x_row + x_step.x * min(column, reach.last[2]), unit.lane, x);
#pragma unroll
          for (int i = 0; i < POSITIONS; ++i) {
            const Acc weight = __shfl_sync(WARP, own[i], lane, LANES);
            if (CAREFUL && (is_past || !reach.holds(i, column))) continue;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll
              for (int j = 0; j < VECTOR; ++j) out[i][v][j] += weight * x[v][j];
          }
        }
      }
    }
  }
}

template <bool INVERSE>
__device__ __forceinline__ void gather(const GatherArguments& args) {
  const Unit unit(args.geometry);
  const Reach reach = INVERSE ? Reach::of_keys(unit) : Reach::of_queries(unit);
  const Step out_step(args.geometry, args.out_at);

  Acc out[POSITIONS][VECTORS][VECTOR] = {};
  accumulate<INVERSE, false>(args, unit, reach, out);
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < POSITIONS * VECTORS * VECTOR; ++i) {
    const Acc value = out[i / (VECTORS * VECTOR)][i / VECTOR % VECTORS][i % VECTOR];
    has_nan = has_nan || value != value;
  }
  if (__any_sync(WARP, has_nan)) {
#pragma unroll
    for (int i = 0; i < POSITIONS * VECTORS * VECTOR; ++i)
      out[i / (VECTORS * VECTOR)][i / VECTOR % VECTORS][i % VECTOR] = 0;
    accumulate<INVERSE, true>(args, unit, reach, out);
  }
#pragma unroll
  for (int i = 0; i < POSITIONS; ++i) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) out[i][v][j] *= Acc(args.scale);
    if (unit.stores(i))
      store_row(unit.group_origin(args.out, args.out_at) +
                    out_step.to(unit.position[0], unit.position[1], unit.x(i)),
                unit.lane, out[i]);
  }
}

}  // namespace natrain
