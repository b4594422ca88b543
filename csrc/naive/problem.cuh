// What the naive kernels share: the constants of a specialisation, the launch's argument, and who works on what.
//
// Baked in besides problem_constants.cuh (macros, from natrain/ops/naive.py): NATRAIN_DTYPE, NATRAIN_HEAD_DIM,
// NATRAIN_VECTOR (elements of q, k, v an access moves), NATRAIN_LANES (threads that share a row of D), NATRAIN_POSITIONS
// (adjacent queries, or keys, along x that they work on at once), NATRAIN_OFFSET (int where every offset inside an image
// fits, else long long); NATRAIN_THREADS and NATRAIN_MIN_BLOCKS (of a block, and on a multiprocessor: they bound the
// registers).
//
// B batch, Z Y X tokens, N heads, D head_dim, K neighbours, P pitch: a row of K weights, padded to 16 bytes.
#pragma once

#include "numeric.cuh"
#include "problem_constants.cuh"

namespace natrain {

using Element = NATRAIN_DTYPE;
using Acc = Accumulator<Element>::type;
using Offset = NATRAIN_OFFSET;

constexpr int HEAD_DIM = NATRAIN_HEAD_DIM;
constexpr int VECTOR = NATRAIN_VECTOR;
constexpr int LANES = NATRAIN_LANES;
constexpr int POSITIONS = NATRAIN_POSITIONS;
constexpr int NEIGHBORS = kernel_size(0) * kernel_size(1) * kernel_size(2);
// Vectors of a row of D that one lane holds; the last may be past the end.
constexpr int VECTORS = (HEAD_DIM / VECTOR + LANES - 1) / LANES;
constexpr bool VECTORS_FIT = VECTORS * LANES * VECTOR == HEAD_DIM;
// Columns of keys that two adjacent queries can reach together: windows move on by at most a stride.
static_assert(POSITIONS == 1 || POSITIONS == 2);
constexpr int COLUMNS = kernel_size(2) + (POSITIONS - 1) * window_stride(2);
// Straight-line code hides the latency of loads better, as long as it fits the instruction cache.
constexpr int UNROLL_ROWS = kernel_size(1) * COLUMNS <= 64 ? kernel_size(1) : 1;
constexpr int UNROLL_CHUNKS = COLUMNS <= 32 ? COLUMNS : 1;

struct Geometry {
  int length[3];    // tokens
  int dilation[3];
  int tile[3];      // of one dilation group that a block works on: positions along z and y, groups of POSITIONS along x
  int tiles[3];     // tiles that cover the longest dilation group
  int heads, head_tile, head_tiles;
  int batch;
};

// POSITIONS queries (or keys) of one head, adjacent along x in one dilation group, shared by LANES adjacent threads.
struct Unit {
  int batch, head;
  int group[3], group_length[3];
  int position[3];  // the first along x
  int lane;
  bool is_active;   // false past an edge: it repeats a neighbour's work, so that shuffles are whole, and stores nothing

  __device__ __forceinline__ explicit Unit(const Geometry& g) {
    lane = threadIdx.x % LANES;
    unsigned unit = threadIdx.x / LANES;
    unsigned block = blockIdx.x;
    const int local_head = unit % g.head_tile;
    unit /= g.head_tile;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const unsigned across = g.tiles[axis] * g.dilation[axis];
      group[axis] = block % across % g.dilation[axis];
      position[axis] = block % across / g.dilation[axis] * g.tile[axis] + unit % g.tile[axis];
      block /= across;
      unit /= g.tile[axis];
    }
    position[2] *= POSITIONS;
    head = block % g.head_tiles * g.head_tile + local_head;
    batch = block / g.head_tiles;
    is_active = unit == 0 && head < g.heads;
    head = min(head, g.heads - 1);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      group_length[axis] = natrain::group_length(g.length[axis], g.dilation[axis], group[axis]);
      is_active = is_active && position[axis] < group_length[axis];
      position[axis] = min(position[axis], group_length[axis] - 1);
    }
  }

  // Of the i-th position along x; past the end of the group it repeats the last one.
  __device__ __forceinline__ int x(int i) const { return min(position[2] + i, group_length[2] - 1); }
  __device__ __forceinline__ bool stores(int i) const { return is_active && position[2] + i < group_length[2]; }

  // Element (batch, the first token of the dilation group, head, 0).
  template <class T>
  __device__ __forceinline__ T* group_origin(T* data, const Layout& at) const {
    return data + (batch * at.batch + head * at.head) +
           (Offset(at.token[0]) * group[0] + Offset(at.token[1]) * group[1] + Offset(at.token[2]) * group[2]);
  }
};

// From one position of a dilation group to the next, in elements.
struct Step {
  Offset z, y, x;

  __device__ __forceinline__ Step(const Geometry& g, const Layout& at)
      : z(Offset(at.token[0]) * g.dilation[0]),
        y(Offset(at.token[1]) * g.dilation[1]),
        x(Offset(at.token[2]) * g.dilation[2]) {}

  __device__ __forceinline__ Offset to(int at_z, int at_y, int at_x) const { return z * at_z + y * at_y + x * at_x; }
};

__device__ __forceinline__ int largest_in_warp(int value) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value = max(value, __shfl_xor_sync(WARP, value, width));
  return value;
}

// Positions first .. last of each axis that a unit's positions reach together, and along x what each reaches itself.
struct Reach {
  int first[3], last[3];
  int x_first[POSITIONS], x_count[POSITIONS];

  // The i-th position reaches column `column`.
  __device__ __forceinline__ bool holds(int i, int column) const {
    return unsigned(column - x_first[i]) < unsigned(x_count[i]);
  }

  // The turns that a loop over an axis takes: as many as any unit of the warp needs.
  __device__ __forceinline__ int turns(int axis) const { return largest_in_warp(last[axis] - first[axis] + 1); }

  // Keys of the unit's queries.
  static __device__ __forceinline__ Reach of_queries(const Unit& unit) {
    return Reach(unit, [](int axis, int position, int n) {
      return window_start(position, n, kernel_size(axis), window_stride(axis), is_causal(axis));
    }, [](int axis, int position, int n) {
      return window_end(position, n, kernel_size(axis), window_stride(axis), is_causal(axis)) - 1;
    });
  }

  // Queries of the unit's keys.
  static __device__ __forceinline__ Reach of_keys(const Unit& unit) {
    return Reach(unit, [](int axis, int position, int n) {
      return inverse_first(position, n, kernel_size(axis), window_stride(axis), is_causal(axis));
    }, [](int axis, int position, int n) {
      return inverse_last(position, n, kernel_size(axis), window_stride(axis), is_causal(axis));
    });
  }

 private:
  template <class First, class Last>
  __device__ __forceinline__ Reach(const Unit& unit, First first_of, Last last_of) {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      first[axis] = first_of(axis, unit.position[axis], unit.group_length[axis]);
      last[axis] = last_of(axis, axis == 2 ? unit.x(POSITIONS - 1) : unit.position[axis], unit.group_length[axis]);
    }
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) {
      x_first[i] = first_of(2, unit.x(i), unit.group_length[2]);
      x_count[i] = last_of(2, unit.x(i), unit.group_length[2]) - x_first[i] + 1;
    }
  }
};

// This lane's share of a row of D, strided by whole vectors over the lanes so that adjacent lanes read adjacent bytes.
__device__ __forceinline__ void load_row(const Element* row, int lane, Acc (&out)[VECTORS][VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int first = (i * LANES + lane) * VECTOR;
    if (VECTORS_FIT || first < HEAD_DIM) {
      load<VECTOR>(row + first, out[i]);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) out[i][j] = 0;
    }
  }
}

__device__ __forceinline__ void store_row(Element* row, int lane, const Acc (&values)[VECTORS][VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int first = (i * LANES + lane) * VECTOR;
    if (VECTORS_FIT || first < HEAD_DIM) store<VECTOR>(row + first, values[i]);
  }
}

}  // namespace natrain
