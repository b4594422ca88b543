// Rows of attention weights [rows, P], worked on by LANES adjacent threads each: softmax, its derivative, dropout.
//
// Macros (natrain/ops/naive.py): NATRAIN_DTYPE, NATRAIN_NEIGHBORS, NATRAIN_PITCH, NATRAIN_WEIGHT_VECTOR, NATRAIN_LANES.
#pragma once

#include "numeric.cuh"

namespace natrain {

using Element = NATRAIN_DTYPE;
using Acc = Accumulator<Element>::type;
constexpr int NEIGHBORS = NATRAIN_NEIGHBORS, PITCH = NATRAIN_PITCH;
constexpr int WEIGHT_VECTOR = NATRAIN_WEIGHT_VECTOR, LANES = NATRAIN_LANES;
// Vectors of a row that one lane works on; the last may be past the end.
constexpr int VECTORS = (PITCH / WEIGHT_VECTOR + LANES - 1) / LANES;
// Longer rows are read again by every pass instead of being held in registers.
constexpr bool HELD = VECTORS * WEIGHT_VECTOR <= 64;
constexpr int UNROLL = HELD ? VECTORS : 1;

struct WeightRow {
  long long row;
  int lane;
  bool is_active;  // false past the last row: it repeats that row, so that shuffles are whole, and stores nothing

  __device__ __forceinline__ explicit WeightRow(long long rows) {
    const long long group = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    lane = threadIdx.x % LANES;
    is_active = group < rows;
    row = is_active ? group : rows - 1;
  }

  __device__ __forceinline__ int slot(int vector, int i) const {
    return (vector * LANES + lane) * WEIGHT_VECTOR + i;
  }

  // The same bits in every lane of the row.
  template <class Combine>
  __device__ __forceinline__ Acc reduce(Acc value, Combine combine) const {
#pragma unroll
    for (int width = LANES / 2; width > 0; width /= 2)
      value = combine(value, __shfl_xor_sync(0xffffffffu, value, width));
    return value;
  }

  __device__ __forceinline__ void store_vector(Element* data, int vector, const Acc (&values)[WEIGHT_VECTOR]) const {
    if (is_active && slot(vector, 0) < PITCH) store<WEIGHT_VECTOR>(data + row * PITCH + slot(vector, 0), values);
  }
};

// One lane's part of one row.
class WeightVectors {
 public:
  __device__ __forceinline__ WeightVectors(const Element* data, const WeightRow& at)
      : data(data + at.row * PITCH), at(at) {
    if constexpr (HELD) {
#pragma unroll
      for (int vector = 0; vector < VECTORS; ++vector) fetch(vector, values[vector]);
    }
  }

  // Writing to what this returns lasts only while rows are HELD.
  __device__ __forceinline__ Acc (&operator[](int vector))[WEIGHT_VECTOR] {
    if constexpr (HELD) return values[vector];
    fetch(vector, values[0]);
    return values[0];
  }

 private:
  // No read-only load: the same thread may overwrite the row in place.
  __device__ __forceinline__ void fetch(int vector, Acc (&to)[WEIGHT_VECTOR]) const {
    if (at.slot(vector, 0) < PITCH) load_mutable<WEIGHT_VECTOR>(data + at.slot(vector, 0), to);
  }

  Acc values[HELD ? VECTORS : 1][WEIGHT_VECTOR];
  const Element* data;
  const WeightRow& at;
};

}  // namespace natrain
