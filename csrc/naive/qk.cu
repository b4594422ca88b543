// scores[query, slot] = scale * q . k (+ rpb), one group of lanes a query; a slot that is no neighbour holds `fill`.
#include "problem.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;
  double scale, fill;
  const Element* q;
  const Element* k;
  const Acc* rpb;  // [N, 2kz-1, 2ky-1, 2kx-1], read when NATRAIN_HAS_RPB
  Element* scores;
  Layout q_at, k_at, scores_at;
  long long pitch;
};

// Every lane brings its part of LANES dot products; lane i leaves with the whole of dot product i.
__device__ __forceinline__ Acc sum_across_lanes(Acc (&part)[LANES], int lane) {
#pragma unroll
  for (int width = LANES / 2; width > 0; width /= 2) {
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const Acc sent = upper ? part[i] : part[i + width];
      const Acc kept = upper ? part[i + width] : part[i];
      part[i] = kept + __shfl_xor_sync(0xffffffffu, sent, width);
    }
  }
  return part[0];
}

extern "C" __global__ void natrain_naive_qk(const __grid_constant__ Arguments args) {
  const Unit unit(args.geometry);
  Acc q[VECTORS][VECTOR];
  load_row(unit.row(args.q, args.q_at), unit.lane, q);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) q[i][j] *= Acc(args.scale);

  const Neighbors neighbors(unit, args.geometry, args.k_at);
  const Element* k_image = unit.image(args.k, args.k_at);
  Element* scores = unit.row(args.scores, args.scores_at);

  // A lane owns WEIGHT_VECTOR adjacent slots of each chunk, so that it stores them at once.
  constexpr int CHUNK = LANES * WEIGHT_VECTOR;
#pragma unroll(UNROLL_NEIGHBORS)
  for (int chunk = 0; chunk < NEIGHBORS; chunk += CHUNK) {
    Acc own[WEIGHT_VECTOR];
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i) {
      Acc part[LANES];
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) {
        const int index = chunk + lane * WEIGHT_VECTOR + i;
        part[lane] = 0;
        if (index < NEIGHBORS) {
          Acc k[VECTORS][VECTOR];
          load_row(k_image + neighbors.offset(Slot(index)), unit.lane, k);
#pragma unroll
          for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) part[lane] += q[v][j] * k[v][j];
        }
      }
      own[i] = sum_across_lanes(part, unit.lane);
    }
    const int first = chunk + unit.lane * WEIGHT_VECTOR;
#pragma unroll
    for (int i = 0; i < WEIGHT_VECTOR; ++i) {
      const Slot slot(first + i);
      const bool is_neighbor = first + i < NEIGHBORS && neighbors.has(slot);
#if NATRAIN_HAS_RPB
      if (is_neighbor) {
        int bias = unit.head;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis)
          bias = bias * (2 * kernel_size(axis) - 1) +
                 (neighbors.start[axis] + slot.at[axis] - unit.position[axis] + kernel_size(axis) - 1);
        own[i] += __ldg(args.rpb + bias);
      }
#endif
      if (!is_neighbor) own[i] = Acc(args.fill);
    }
    if (unit.is_active && first < args.pitch) store<WEIGHT_VECTOR>(scores + first, own);
  }
}
