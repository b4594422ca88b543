// Gradients of dense units: probabilities and d_scores of a whole unit, [queries][lanes], stay in the first-level cache, so
// that the gradients of keys are products over all queries and no sums in memory.
#pragma once

#include "dense.h"

namespace natrain {

// A query's scores -> probabilities, products -> d_scores, in place.
inline void dense_softmax_backward(const DensePlan& dense, Real lse, Real d_lse, Real* scores, Real* products) {
  const int last = dense.lanes - LANES;
  Vector total = {};
  for (int at = 0; at <= last; at += LANES) {
    Vector p = exponential(load(scores + at) - lse), term = p * load(products + at);
    if (at == last) term = select(dense.last, term, Vector{});
    total += term;
    store(scores + at, p);
  }
  const Real delta = sum_lanes(total) - d_lse;
  for (int at = 0; at <= last; at += LANES) {
    store(products + at, load(scores + at) * (load(products + at) - delta));
  }
}

template <class E>
inline void dense_backward_unit(const DensePlan& dense, const DenseTokens& tokens, const Unit& unit, const Unit& next,
                                const Real* bias, Scratch& scratch) {
  const Plan& plan = dense.plan;
  const Arguments& a = plan.a;
  const int lanes = plan.dim_lanes, dims = a.head_dim;
  const DenseRows<E> q(a, a.q, tokens.q, unit, next), k(a, a.k, tokens.k, unit, next), v(a, a.v, tokens.v, unit, next);
  const DenseRows<E> d_out(a, a.d_out, tokens.d_out, unit, next), d_q(a, a.d_q, tokens.d_q, unit, next);
  const DenseRows<E> d_k(a, a.d_k, tokens.d_k, unit, next), d_v(a, a.d_v, tokens.d_v, unit, next);
  const DenseRows<Real> lse(a, a.lse, tokens.lse, unit, next);
  const int64_t size = int64_t(dense.lanes) * lanes, size_t = int64_t(dims) * dense.lanes;
  Real* rows = scratch.rows.reserve(size);
  Real* d_outs = scratch.d_outs.reserve(size);
  Real* keys = scratch.keys.reserve(size);
  Real* keys_t = scratch.keys_t.reserve(size_t);
  Real* values = scratch.values.reserve(size);
  Real* values_t = scratch.values_t.reserve(size_t);
  Real* probs = scratch.scores.reserve((a.has_dropout ? 3 : 2) * dense.count());
  Real* d_scores = probs + dense.count();
  Real* dropped = a.has_dropout ? d_scores + dense.count() : probs;
  Real* results = scratch.results.reserve(QUERY_BLOCK * lanes);
  k.gather(dims, lanes, Real(1), keys);
  transpose_keys(dense, keys, keys_t);
  v.gather(dims, lanes, Real(1), values);
  transpose_keys(dense, values, values_t);
  q.gather(dims, lanes, Real(a.scale), rows);
  d_out.gather(dims, lanes, Real(1), d_outs);
  over_blocks(dense.keys, [&](int from, int count) {
    const int past = from + count;
    d_q.prefetch_to_write(from, past, dims);
    q.prefetch_next(from, past, dims);
    k.prefetch_next(from, past, dims);
    v.prefetch_next(from, past, dims);
    d_out.prefetch_next(from, past, dims);
    const int64_t at = int64_t(from) * dense.lanes;
    score<false>(count, rows + from * lanes, lanes, dims, keys_t, dense.columns.data(), dense.lanes, dense.vectors,
                 bias ? bias + at : nullptr, probs + at, dense.lanes);
    score<false>(count, d_outs + from * lanes, lanes, dims, values_t, dense.columns.data(), dense.lanes, dense.vectors,
                 nullptr, d_scores + at, dense.lanes);
    for (int i = from; i < past; ++i) {
      const int64_t row = int64_t(i) * dense.lanes;
      const Real saved = *lse[i];
      const Real d_lse = a.d_lse.data ? DenseRows<Real>(a, a.d_lse, tokens.d_lse, unit, next)[i][0] : Real(0);
      if (a.has_dropout) dense.drop(unit, i, d_scores + row);
      // The softmax of an infinite score is NaN everywhere, not 0 at the other keys.
      dense_softmax_backward(dense, saved + (saved - saved), d_lse, probs + row, d_scores + row);
      if (!a.has_dropout) continue;
      std::copy(probs + row, probs + row + dense.lanes, dropped + row);
      dense.drop(unit, i, dropped + row);
    }
    weigh(count, d_scores + at, dense.lanes, dense.all_keys(), keys, results);
    for (int i = 0; i < count; ++i) write_row(d_q[from + i], dims, Real(a.scale), results + i * lanes);
  });
  if (a.d_rpb) {
    Real* d_bias = scratch.d_bias.data();
    for (int64_t i = 0; i < dense.count(); i += LANES) store(d_bias + i, load(d_bias + i) + load(d_scores + i));
  }
  over_blocks(dense.keys, [&](int from, int count) {
    d_k.prefetch_to_write(from, from + count, dims);
    d_v.prefetch_to_write(from, from + count, dims);
    weigh(count, d_scores + from, 1, dense.all_queries(), rows, results);
    for (int i = 0; i < count; ++i) write_row(d_k[from + i], dims, Real(1), results + i * lanes);
    weigh(count, dropped + from, 1, dense.all_queries(), d_outs, results);
    for (int i = 0; i < count; ++i) write_row(d_v[from + i], dims, Real(1), results + i * lanes);
  });
}

}  // namespace natrain
