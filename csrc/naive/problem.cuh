// What the naive kernels share: the constants of a specialisation, the launch's argument, and who works on what.
//
// Axes are always z, y, x; a problem of lower rank has leading axes of length 1 and kernel size 1, which the compiler
// folds away. Baked in (macros, from natrain/ops/naive.py): NATRAIN_DTYPE, NATRAIN_HEAD_DIM, and per axis
// NATRAIN_KERNEL_SIZE_Z.., NATRAIN_STRIDE_Z.., NATRAIN_IS_CAUSAL_Z..; NATRAIN_VECTOR (elements of q, k, v an access moves),
// NATRAIN_WEIGHT_VECTOR (of the attention weights), NATRAIN_LANES (threads that share one query, or key),
// NATRAIN_OFFSET (int where every offset inside an image fits, else long long).
//
// B batch, Z Y X tokens, N heads, D head_dim, K neighbours, P pitch: a row of K weights, padded to 16 bytes.
#pragma once

#include "numeric.cuh"
#include "window.h"

namespace natrain {

using Element = NATRAIN_DTYPE;
using Acc = Accumulator<Element>::type;
using Offset = NATRAIN_OFFSET;

__device__ constexpr int kernel_size(int axis) {
  const int sizes[3] = {NATRAIN_KERNEL_SIZE_Z, NATRAIN_KERNEL_SIZE_Y, NATRAIN_KERNEL_SIZE_X};
  return sizes[axis];
}
__device__ constexpr int window_stride(int axis) {
  const int strides[3] = {NATRAIN_STRIDE_Z, NATRAIN_STRIDE_Y, NATRAIN_STRIDE_X};
  return strides[axis];
}
__device__ constexpr bool is_causal(int axis) {
  const bool causal[3] = {NATRAIN_IS_CAUSAL_Z, NATRAIN_IS_CAUSAL_Y, NATRAIN_IS_CAUSAL_X};
  return causal[axis];
}

constexpr int HEAD_DIM = NATRAIN_HEAD_DIM;
constexpr int VECTOR = NATRAIN_VECTOR;
constexpr int LANES = NATRAIN_LANES;
constexpr int WEIGHT_VECTOR = NATRAIN_WEIGHT_VECTOR;
constexpr int NEIGHBORS = kernel_size(0) * kernel_size(1) * kernel_size(2);
// Vectors of a row of D that one lane holds; the last may be past the end.
constexpr int VECTORS = (HEAD_DIM / VECTOR + LANES - 1) / LANES;
constexpr bool VECTORS_FIT = VECTORS * LANES * VECTOR == HEAD_DIM;
// Beyond this many neighbours straight-line code outgrows the instruction cache.
constexpr int UNROLL_NEIGHBORS = NEIGHBORS <= 64 ? NEIGHBORS : 1;

// Strides in elements; the last axis ([D] or [K]) has stride 1.
struct Layout {
  long long batch, token[3], head;
};

struct Geometry {
  int length[3];     // tokens
  int dilation[3];
  int tile[3];       // positions of one dilation group that a block works on
  int tiles[3];      // tiles that cover the longest group
  int heads, head_tile, head_tiles;
  int batch;
};

// One query (or key) of one head, shared by LANES adjacent threads.
struct Unit {
  int batch, head;
  int token[3], group[3], position[3], group_length[3];
  int lane;
  bool is_active;  // false past an edge: it repeats a neighbour's work, so that shuffles are whole, and stores nothing

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
    head = block % g.head_tiles * g.head_tile + local_head;
    batch = block / g.head_tiles;
    is_active = unit == 0 && head < g.heads;
    head = min(head, g.heads - 1);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      group_length[axis] = natrain::group_length(g.length[axis], g.dilation[axis], group[axis]);
      is_active = is_active && position[axis] < group_length[axis];
      position[axis] = min(position[axis], group_length[axis] - 1);
      token[axis] = position[axis] * g.dilation[axis] + group[axis];
    }
  }

  // Element (batch, token, head, 0).
  template <class T>
  __device__ __forceinline__ T* row(T* data, const Layout& at) const {
    return image(data, at) + (Offset(at.token[0]) * token[0] + Offset(at.token[1]) * token[1] +
                              Offset(at.token[2]) * token[2]);
  }

  // Element (batch, token 0, head, 0).
  template <class T>
  __device__ __forceinline__ T* image(T* data, const Layout& at) const {
    return data + (batch * at.batch + head * at.head);
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

// The slots (z, y, x) of a neighbour in row-major order of the window.
struct Slot {
  int at[3];

  __device__ __forceinline__ explicit Slot(int index)
      : at{index / (kernel_size(1) * kernel_size(2)), index / kernel_size(2) % kernel_size(1),
           index % kernel_size(2)} {}
};

// The keys of one query, as offsets from token 0 of its image.
struct Neighbors {
  Offset first;
  Offset step[3];
  int start[3], count[3];  // count < kernel_size where a causal query lacks keys

  __device__ __forceinline__ Neighbors(const Unit& unit, const Geometry& g, const Layout& at) : first(0) {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int k = kernel_size(axis), s = window_stride(axis);
      start[axis] = window_start(unit.position[axis], unit.group_length[axis], k, s, is_causal(axis));
      count[axis] = window_end(unit.position[axis], unit.group_length[axis], k, s, is_causal(axis)) - start[axis];
      step[axis] = Offset(at.token[axis]) * g.dilation[axis];
      first += Offset(at.token[axis]) * unit.group[axis] + step[axis] * start[axis];
    }
  }

  __device__ __forceinline__ bool has(const Slot& slot) const {
    bool inside = true;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) inside = inside && (!is_causal(axis) || slot.at[axis] < count[axis]);
    return inside;
  }

  // A slot that the query lacks reads its last neighbour instead.
  __device__ __forceinline__ Offset offset(const Slot& slot) const {
    Offset sum = first;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int index = is_causal(axis) ? min(slot.at[axis], count[axis] - 1) : slot.at[axis];
      sum += step[axis] * index;
    }
    return sum;
  }
};

}  // namespace natrain
