// Units whose windows all hold every key of their dilation group (a 7x7 map with kernel size 7, say): no tiles, no masks
// but the last vector's, and the bias a matrix that the scores' sums start from. All units have one size, so that each
// asks the memory for the next one's tokens while it computes.
#pragma once

#include "unit.h"

namespace natrain {

// What all units of a problem share.
struct DensePlan {
  const Plan& plan;
  int n[3], keys, lanes, vectors;  // lanes: keys in whole vectors
  unsigned last;                   // lanes of the last vector that hold keys
  std::vector<int64_t> columns;
  int first_lane = 0;
  int64_t first_row = 0;

  explicit DensePlan(const Plan& p) : plan(p), n{p.axes[0][0].n, p.axes[1][0].n, p.axes[2][0].n} {
    keys = n[0] * n[1] * n[2];
    lanes = round_up(keys, LANES);
    vectors = lanes / LANES;
    last = lane_range(0, keys - lanes + LANES);
    for (int v = 0; v < vectors; ++v) columns.push_back(v * LANES);
  }

  // Sums over keys, with weights [queries][lanes].
  KeyRows all_keys() const { return {1, keys, plan.dim_lanes, 1, &first_lane, &first_row}; }
  // Sums over queries, with the same weights.
  KeyRows all_queries() const { return {1, keys, plan.dim_lanes, lanes, &first_lane, &first_row}; }

  // Where a unit's tokens lie, as distances from its first.
  std::vector<int64_t> tokens(const TensorArgument& tensor) const {
    std::vector<int64_t> at;
    const int64_t* dilation = plan.a.dilation;
    for (int z = 0; z < n[0]; ++z) {
      for (int y = 0; y < n[1]; ++y) {
        for (int x = 0; x < n[2]; ++x) {
          at.push_back(z * dilation[0] * tensor.token[0] + y * dilation[1] * tensor.token[1] +
                       x * dilation[2] * tensor.token[2]);
        }
      }
    }
    return at;
  }

  // The bias of one head and its gradient are matrices [queries][lanes].
  int64_t count() const { return int64_t(keys) * lanes; }

  // Calls f(entry of rpb, element of the matrix) for the first of each run of n[2] adjacent keys.
  template <class F>
  void over_bias(F&& f) const {
    const int *size = plan.rpb_rows;
    int64_t row = 0;
    for (int z = n[0] - 1; z >= 0; --z) {
      for (int y = n[1] - 1; y >= 0; --y) {
        for (int x = n[2] - 1; x >= 0; --x, row += lanes) {
          int64_t at = row;
          for (int kz = z; kz < z + n[0]; ++kz) {
            for (int ky = y; ky < y + n[1]; ++ky, at += n[2]) f((kz * size[1] + ky) * size[2] + x, at);
          }
        }
      }
    }
  }

  void read(const Plan&, int head, Real* table) const {
    const int* size = plan.rpb_rows;
    const Real* from = plan.a.rpb + int64_t(head) * size[0] * size[1] * size[2];
    std::fill(table, table + count(), Real(0));
    over_bias([&](int entry, int64_t at) {
      for (int x = 0; x < n[2]; ++x) table[at + x] = from[entry + x];
    });
  }

  void add(const Plan&, const Real* table, Real* to) const {
    over_bias([&](int entry, int64_t at) {
      for (int x = 0; x < n[2]; ++x) to[entry + x] += table[at + x];
    });
  }

  // Multiplies what dropout keeps of one query's `weights`, and clears the rest.
  void drop(const Unit& unit, int query, Real* weights) const {
    const Arguments& a = plan.a;
    const int64_t token = unit.token(a, query / (n[1] * n[2]), query / n[2] % n[1], query % n[2]);
    const int64_t tokens = a.length[0] * a.length[1] * a.length[2];
    const DropoutRow row(a.seed, (int64_t(unit.image) * a.heads + unit.head) * tokens + token);
    for (int key = 0; key < keys; ++key) {
      weights[key] = row.keeps(key, unsigned(a.drop_threshold)) ? weights[key] * Real(a.keep_scale) : Real(0);
    }
  }
};

// DensePlan::tokens of every tensor.
struct DenseTokens {
  std::vector<int64_t> q, k, v, out, lse, d_out, d_lse, d_q, d_k, d_v;

  explicit DenseTokens(const DensePlan& dense) {
    const Arguments& a = dense.plan.a;
    q = dense.tokens(a.q), k = dense.tokens(a.k), v = dense.tokens(a.v);
    out = dense.tokens(a.out), lse = dense.tokens(a.lse);
    d_out = dense.tokens(a.d_out), d_lse = dense.tokens(a.d_lse);
    d_q = dense.tokens(a.d_q), d_k = dense.tokens(a.d_k), d_v = dense.tokens(a.d_v);
  }
};

// One tensor's tokens of a unit and of the next.
template <class E>
struct DenseRows {
  const std::vector<int64_t>& at;
  E *here, *next;

  DenseRows(const Arguments& a, const TensorArgument& t, const std::vector<int64_t>& tokens, const Unit& unit,
            const Unit& following)
      : at(tokens), here(static_cast<E*>(t.data) + unit.offset(a, t, 0, 0, 0)),
        next(static_cast<E*>(t.data) + following.offset(a, t, 0, 0, 0)) {}

  E* operator[](int token) const { return here + at[token]; }

  void gather(int dims, int lanes, Real factor, Real* to) const {
    for (const int64_t offset : at) {
      read_row(static_cast<const E*>(here) + offset, dims, factor, to);
      to += lanes;
    }
  }

  void prefetch_next(int from, int past, int dims) const {
    for (int i = from; i < past; ++i) prefetch_row(next + at[i], dims);
  }

  void prefetch_to_write(int from, int past, int dims) const {
    for (int i = from; i < past; ++i) prefetch_row_to_write(here + at[i], dims);
  }
};

// Columns of head_dim components; `natural` has room for whole blocks of rows.
inline void transpose_keys(const DensePlan& dense, const Real* natural, Real* transposed) {
  const int lanes = dense.plan.dim_lanes;
  for (int key = 0; key < dense.keys; key += LANES) {
    transpose_block(natural + int64_t(key) * lanes, lanes, dense.plan.a.head_dim, transposed + key, dense.lanes);
  }
}

// Calls f(first query, count) for blocks of queries of nearly equal size.
template <class F>
inline void over_blocks(int queries, F&& f) {
  const int blocks = (queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
  for (int b = 0; b < blocks; ++b) {
    const int from = queries * b / blocks;
    f(from, queries * (b + 1) / blocks - from);
  }
}

}  // namespace natrain
