// out and lse of dense units.
#pragma once

#include "dense.h"

namespace natrain {

// A query's scores -> probabilities times their sum, in place.
inline void dense_softmax(const DensePlan& dense, Real* scores, Real& sum, Real& most) {
  const int last = dense.lanes - LANES;
  Vector highest = select(dense.last, load(scores + last), broadcast(-std::numeric_limits<Real>::infinity()));
  store(scores + last, highest);
  for (int at = 0; at < last; at += LANES) highest = maximum(load(scores + at), highest);
  most = max_lanes(highest);
  Vector total = {};
  for (int at = 0; at <= last; at += LANES) {
    const Vector p = exponential(load(scores + at) - most);
    total += p;
    store(scores + at, p);
  }
  sum = sum_lanes(total);
}

template <class E>
inline void dense_forward_unit(const DensePlan& dense, const DenseTokens& tokens, const Unit& unit, const Unit& next,
                               const Real* bias, Scratch& scratch) {
  const Plan& plan = dense.plan;
  const Arguments& a = plan.a;
  const int lanes = plan.dim_lanes, dims = a.head_dim;
  const DenseRows<E> q(a, a.q, tokens.q, unit, next), k(a, a.k, tokens.k, unit, next), v(a, a.v, tokens.v, unit, next);
  const DenseRows<E> out(a, a.out, tokens.out, unit, next);
  const DenseRows<Real> lse(a, a.lse, tokens.lse, unit, next);
  const int64_t size = int64_t(dense.lanes) * lanes;
  Real* rows = scratch.rows.reserve(size);
  Real* keys = scratch.keys.reserve(size);
  Real* keys_t = scratch.keys_t.reserve(int64_t(dims) * dense.lanes);
  Real* values = scratch.values.reserve(size);
  Real* scores = scratch.scores.reserve(int64_t(QUERY_BLOCK) * dense.lanes);
  Real* results = scratch.results.reserve(QUERY_BLOCK * lanes);
  k.gather(dims, lanes, Real(1), keys);
  transpose_keys(dense, keys, keys_t);
  q.gather(dims, lanes, Real(a.scale), rows);
  v.gather(dims, lanes, Real(1), values);
  over_blocks(dense.keys, [&](int from, int count) {
    out.prefetch_to_write(from, from + count, dims);
    q.prefetch_next(from, from + count, dims);
    k.prefetch_next(from, from + count, dims);
    v.prefetch_next(from, from + count, dims);
    score<false>(count, rows + from * lanes, lanes, dims, keys_t, dense.columns.data(), dense.lanes, dense.vectors,
                 bias ? bias + int64_t(from) * dense.lanes : nullptr, scores, dense.lanes);
    Real sum[QUERY_BLOCK], most[QUERY_BLOCK];
    for (int i = 0; i < count; ++i) {
      dense_softmax(dense, scores + i * dense.lanes, sum[i], most[i]);
      if (a.has_dropout) dense.drop(unit, from + i, scores + i * dense.lanes);
    }
    weigh(count, scores, dense.lanes, dense.all_keys(), values, results);
    for (int i = 0; i < count; ++i) {
      write_row(out[from + i], dims, 1 / sum[i], results + i * lanes);
      *lse[from + i] = log_sum(sum[i], most[i]);
    }
  });
}

}  // namespace natrain
