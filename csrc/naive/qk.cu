// scores[query, slot] = scale * q . k (+ rpb); a slot that is no neighbour, and a row's padding, hold `fill`.
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

constexpr int KZ = kernel_size(0), KY = kernel_size(1), KX = kernel_size(2);

// Every lane brings its part of LANES dot products; lane i leaves with the whole of dot product i.
__device__ __forceinline__ Acc sum_across_lanes(Acc (&part)[LANES], int lane) {
#pragma unroll
  for (int width = LANES / 2; width > 0; width /= 2) {
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const Acc sent = upper ? part[i] : part[i + width];
      const Acc kept = upper ? part[i + width] : part[i];
      part[i] = kept + __shfl_xor_sync(WARP, sent, width);
    }
  }
  return part[0];
}

// Slots that no key fills: the padding, and what a causal query lacks.
__device__ __forceinline__ void fill_rest(Element* scores, const Unit& unit, const Reach& reach, int i, Acc fill,
                                          int pitch) {
  constexpr bool ANY_CAUSAL = is_causal(0) || is_causal(1) || is_causal(2);
  for (int slot = (ANY_CAUSAL ? 0 : NEIGHBORS) + unit.lane; slot < pitch; slot += LANES) {
    const int z = slot / (KX * KY), y = slot / KX % KY, x = slot % KX;
    const bool is_neighbor = slot < NEIGHBORS && z <= reach.last[0] - reach.first[0] &&
                             y <= reach.last[1] - reach.first[1] && x < reach.x_count[i];
    if (!is_neighbor) scores[slot] = narrow<Element>(fill);
  }
}

extern "C" __global__ void __launch_bounds__(NATRAIN_THREADS, NATRAIN_MIN_BLOCKS)
    natrain_naive_qk(const __grid_constant__ Arguments args) {
  const Geometry& g = args.geometry;
  const Unit unit(g);
  const Reach keys = Reach::of_queries(unit);
  const Step q_step(g, args.q_at), k_step(g, args.k_at), scores_step(g, args.scores_at);
  const Element* k_origin = unit.group_origin(args.k, args.k_at);
  const int z0 = unit.position[0], y0 = unit.position[1];

  Acc q[POSITIONS][VECTORS][VECTOR];
  Element* scores[POSITIONS];
#pragma unroll
  for (int i = 0; i < POSITIONS; ++i) {
    load_row(unit.group_origin(args.q, args.q_at) + q_step.to(z0, y0, unit.x(i)), unit.lane, q[i]);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) q[i][v][j] *= Acc(args.scale);
    scores[i] = unit.group_origin(args.scores, args.scores_at) + scores_step.to(z0, y0, unit.x(i));
    if (unit.stores(i)) fill_rest(scores[i], unit, keys, i, Acc(args.fill), int(args.pitch));
  }

  const int planes = is_causal(0) ? keys.turns(0) : KZ, rows = is_causal(1) ? keys.turns(1) : KY;
  for (int plane = 0; plane < planes; ++plane) {
#pragma unroll(UNROLL_ROWS)
    for (int row = 0; row < rows; ++row) {
      const int z = min(keys.first[0] + plane, keys.last[0]), y = min(keys.first[1] + row, keys.last[1]);
      // Another unit of the warp has more keys.
      const bool is_past = keys.first[0] + plane > keys.last[0] || keys.first[1] + row > keys.last[1];
      const Element* k_row = k_origin + k_step.to(z, y, 0);
      const int slot_row = (plane * KY + row) * KX;
#if NATRAIN_HAS_RPB
      const Acc* bias_row =
          args.rpb + (((long long)unit.head * (2 * KZ - 1) + (z - z0 + KZ - 1)) * (2 * KY - 1) + (y - y0 + KY - 1)) *
                         (2 * KX - 1) + (KX - 1);
#endif
#pragma unroll(UNROLL_CHUNKS)
      for (int chunk = 0; chunk < COLUMNS; chunk += LANES) {
        Acc part[POSITIONS][LANES] = {};
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
          Acc k[VECTORS][VECTOR];
          load_row(k_row + k_step.x * min(keys.first[2] + chunk + lane, keys.last[2]), unit.lane, k);
#pragma unroll
          for (int i = 0; i < POSITIONS; ++i)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll
              for (int j = 0; j < VECTOR; ++j) part[i][lane] += q[i][v][j] * k[v][j];
        }
        // Now one column a lane.
        const int column = keys.first[2] + chunk + unit.lane;
#pragma unroll
        for (int i = 0; i < POSITIONS; ++i) {
          Acc score = sum_across_lanes(part[i], unit.lane);
          if (is_past || !keys.holds(i, column) || !unit.stores(i)) continue;
#if NATRAIN_HAS_RPB
          score += __ldg(bias_row + (column - unit.x(i)));
#endif
          scores[i][slot_row + column - keys.x_first[i]] = narrow<Element>(score);
        }
      }
    }
  }
}
