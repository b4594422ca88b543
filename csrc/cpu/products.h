// The four small matrix products of attention, blocked for registers. Q queries of a tile at a time; keys are lanes where
// a product makes scores, head_dim is lanes where it makes rows.
#pragma once

#include <type_traits>
#include <utility>

#include "vector.h"

namespace natrain {

// Calls f with std::integral_constant<int, count> for count in [1, MOST].
template <int MOST, class F>
inline void with_count(int count, F&& f) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_count<MOST - 1>(count, f);
  }
  f(std::integral_constant<int, MOST>());
}

// scores[Q][lanes] = rows[Q][D] . keys, where vector v of component d lies at transposed + columns[v] + d * pitch; in pairs
// its halves are those of columns[2 v] and columns[2 v + 1]. `bias`, null or as large as scores, is added.
template <int Q, int KEYS, bool PAIRED>
inline void score_vectors(const Real* rows, int row_pitch, int dims, const Real* transposed, const int64_t* columns,
                          int64_t pitch, const Real* bias, Real* scores, int score_pitch) {
  const Real* column[PAIRED ? 2 * KEYS : KEYS];
  for (int v = 0; v < (PAIRED ? 2 * KEYS : KEYS); ++v) column[v] = transposed + columns[v];
  Vector sum[Q][KEYS] = {};
  if (bias) {
#pragma GCC unroll 6
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < KEYS; ++v) sum[q][v] = load(bias + q * score_pitch + v * LANES);
    }
  }
  for (int d = 0; d < dims; ++d) {
    const int64_t at = d * pitch;
    Vector key[KEYS];
#pragma GCC unroll 4
    for (int v = 0; v < KEYS; ++v) {
      key[v] = PAIRED ? load_pair(column[2 * v] + at, column[2 * v + 1] + at) : load(column[v] + at);
    }
#pragma GCC unroll 6
    for (int q = 0; q < Q; ++q) {
      const Vector row = broadcast(rows[q * row_pitch + d]);
#pragma GCC unroll 4
      for (int v = 0; v < KEYS; ++v) sum[q][v] += row * key[v];
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < KEYS; ++v) store(scores + q * score_pitch + v * LANES, sum[q][v]);
  }
}

template <bool PAIRED>
inline void score(int queries, const Real* rows, int row_pitch, int dims, const Real* transposed,
                  const int64_t* columns, int64_t pitch, int vectors, const Real* bias, Real* scores,
                  int score_pitch) {
  with_count<QUERY_BLOCK>(queries, [&](auto q) {
    int v = 0;
    const auto step = [&](auto keys) {
      score_vectors<q(), keys(), PAIRED>(rows, row_pitch, dims, transposed, columns + (PAIRED ? 2 : 1) * v, pitch,
                                         bias ? bias + v * LANES : nullptr, scores + v * LANES, score_pitch);
      v += keys();
    };
    while (v + KEY_VECTORS <= vectors) step(std::integral_constant<int, KEY_VECTORS>());
    if (v < vectors) with_count<KEY_VECTORS - 1>(vectors - v, step);
  });
}

// The keys of a tile: `count` rows of `width` adjacent keys; key x of row r is lane lane[r] + x * step of the scores and
// starts at first[r] + x * pitch in the packed keys, values, or their gradients. `step` is 1 but in sums over queries.
struct KeyRows {
  int count, width, pitch, step;
  const int* lane;
  const int64_t* first;
};

// out[Q][D] = weights[Q][lanes] . packed[keys][D].
template <int Q, int DIMS>
inline void weigh_vectors(const Real* weights, int weight_pitch, const KeyRows& keys, const Real* packed, Real* out) {
  Vector sum[Q][DIMS] = {};
  for (int r = 0; r < keys.count; ++r) {
    const Real* row = packed + keys.first[r];
    const Real* weight = weights + keys.lane[r];
    for (int x = 0; x < keys.width; ++x, row += keys.pitch, weight += keys.step) {
      Vector value[DIMS];
#pragma GCC unroll 2
      for (int v = 0; v < DIMS; ++v) value[v] = load(row + v * LANES);
#pragma GCC unroll 6
      for (int q = 0; q < Q; ++q) {
        const Vector w = broadcast(weight[q * weight_pitch]);
#pragma GCC unroll 2
        for (int v = 0; v < DIMS; ++v) sum[q][v] += w * value[v];
      }
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
    for (int v = 0; v < DIMS; ++v) store(out + q * keys.pitch + v * LANES, sum[q][v]);
  }
}

// packed[keys][D] += weights[Q][lanes]^T . rows[Q][D].
template <int Q, int DIMS>
inline void scatter_vectors(const Real* weights, int weight_pitch, const KeyRows& keys, const Real* rows,
                            Real* packed) {
  Vector row[Q][DIMS];
#pragma GCC unroll 6
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
    for (int v = 0; v < DIMS; ++v) row[q][v] = load(rows + q * keys.pitch + v * LANES);
  }
  for (int r = 0; r < keys.count; ++r) {
    Real* to = packed + keys.first[r];
    const Real* weight = weights + keys.lane[r];
    for (int x = 0; x < keys.width; ++x, to += keys.pitch) {
      Vector sum[DIMS];
#pragma GCC unroll 2
      for (int v = 0; v < DIMS; ++v) sum[v] = load(to + v * LANES);
#pragma GCC unroll 6
      for (int q = 0; q < Q; ++q) {
        const Vector w = broadcast(weight[q * weight_pitch + x]);
#pragma GCC unroll 2
        for (int v = 0; v < DIMS; ++v) sum[v] += w * row[q][v];
      }
#pragma GCC unroll 2
      for (int v = 0; v < DIMS; ++v) store(to + v * LANES, sum[v]);
    }
  }
}

// Runs step<Q, DIMS>(offset of the dims) over head_dim.
template <class Step>
inline void over_dims(int queries, int dim_lanes, Step&& step) {
  with_count<QUERY_BLOCK>(queries, [&](auto q) {
    int d = 0;
    for (; d + DIM_VECTORS * LANES <= dim_lanes; d += DIM_VECTORS * LANES) {
      step(q, std::integral_constant<int, DIM_VECTORS>(), d);
    }
    if (d < dim_lanes) with_count<DIM_VECTORS - 1>((dim_lanes - d) / LANES, [&](auto dims) { step(q, dims, d); });
  });
}

inline void weigh(int queries, const Real* weights, int weight_pitch, const KeyRows& keys, const Real* packed,
                  Real* out) {
  over_dims(queries, keys.pitch, [&](auto q, auto dims, int d) {
    weigh_vectors<q(), dims()>(weights, weight_pitch, keys, packed + d, out + d);
  });
}

inline void scatter(int queries, const Real* weights, int weight_pitch, const KeyRows& keys, const Real* rows,
                    Real* packed) {
  over_dims(queries, keys.pitch, [&](auto q, auto dims, int d) {
    scatter_vectors<q(), dims()>(weights, weight_pitch, keys, rows + d, packed + d);
  });
}

}  // namespace natrain
