// Gradients of q, k, v and the bias from d_out, lse and what forward read: per block of queries the probabilities are
// computed again, and the gradients of the tile's keys add up in packed buffers that only this unit writes.
//
// A slab owns its queries (d_q, the bias) and the keys at the same positions (d_k, d_v). It also visits the neighbouring
// slabs' tiles that see its keys. Every sum's order is fixed by the problem, so no result depends on the threads.
#pragma once

#include "dense_backward.h"

namespace natrain {

// scores -> probabilities, products -> d_scores, in place; `dropped` receives what multiplies the values.
template <bool PAIRED>
inline void softmax_backward(const Plan& plan, const Tile& tile, const LaneWindow& w, const BiasTable& table,
                             const Real* bias, const DropoutRow* dropout, Real lse, Real d_lse,
                             Real* scores, Real* products, Real* dropped) {
  const Real keep_scale = plan.a.keep_scale;
  Vector total = {};
  over_vectors<PAIRED>(plan.shape, tile, w, [&](int vector, unsigned mask, int z, int y, int x) {
    const int at = vector * LANES;
    Vector s = load(scores + at);
    if (bias) s += bias_vector<PAIRED>(table, bias, z, y, x);
    const Vector p = select(mask, exponential(s - lse), Vector{});
    unsigned kept = mask;
    Vector product = load(products + at);
    if (dropout) {
      kept = kept_lanes(plan, *dropout, w, mask, PAIRED, z, y, x);
      product = product * keep_scale;
      store(dropped + at, select(kept, p * keep_scale, Vector{}));
    }
    product = select(kept, product, Vector{});
    total += p * product;
    store(scores + at, p);
    store(products + at, product);
  });
  const Real delta = sum_lanes(total) - d_lse;
  const int vectors = tile.lanes / LANES;
  for (int at = 0; at < vectors * LANES; at += LANES) {
    store(products + at, load(scores + at) * (load(products + at) - delta));
  }
}

// The bias gradient of one query's row of d_scores.
template <bool PAIRED>
inline void add_bias_gradient(const Plan& plan, const Tile& tile, const LaneWindow& w, const BiasTable& table,
                              const Real* d_scores, Real* origin) {
  typedef Real Half __attribute__((vector_size(VECTOR_BYTES / 2), aligned(alignof(Real)), may_alias));
  over_vectors<PAIRED>(plan.shape, tile, w, [&](int vector, unsigned mask, int z, int y, int x) {
    if (!mask) return;
    Real* to = origin + int64_t(z * table.rows_y + y) * table.pitch + x;
    const Real* from = d_scores + vector * LANES;
    if constexpr (PAIRED) {
      constexpr int half = LANES / 2;
      if (mask & ((1u << half) - 1)) *reinterpret_cast<Half*>(to) += *reinterpret_cast<const Half*>(from);
      if (mask >> half) *reinterpret_cast<Half*>(to + table.pitch) += *reinterpret_cast<const Half*>(from + half);
    } else {
      store(to, load(to) + load(from));
    }
  });
}

template <class E, bool PAIRED>
inline void backward_unit(const Plan& plan, const Unit& unit, const Real* head_bias, Scratch& scratch) {
  const Arguments& a = plan.a;
  const int cut = a.slab_axis;
  if (unit.is_empty(cut)) return;
  // Own queries and keys, [own, own_end) along the cut axis; visited tiles are those that see an own key.
  int tiles[3], tiles_end[3], first[3], end[3], own_first[3], own_end[3];
  for (int axis = 0; axis < 3; ++axis) {
    const std::vector<Span>& spans = unit.axes[axis]->tiles;
    tiles[axis] = unit.tiles[axis], tiles_end[axis] = unit.tiles_end[axis];
    own_first[axis] = spans[tiles[axis]].query, own_end[axis] = spans[tiles_end[axis] - 1].query_end;
    while (tiles[axis] > 0 && spans[tiles[axis] - 1].key_end > own_first[axis]) --tiles[axis];
    while (tiles_end[axis] < int(spans.size()) && spans[tiles_end[axis]].key < own_end[axis]) ++tiles_end[axis];
    // Own keys that no own query sees (causal windows with a stride) still have gradients, of 0.
    first[axis] = std::min(spans[tiles[axis]].key, own_first[axis]);
    end[axis] = std::max(spans[tiles_end[axis] - 1].key_end, own_end[axis]);
  }
  const PackedBox box(plan, first, end);
  const TileShape& shape = plan.shape;
  const int lanes = box.dim_lanes;
  Real* block = scratch.block.reserve(LANES * lanes);
  Real* keys_t = scratch.keys_t.reserve(box.transposed_count(shape.row_lanes));
  Real* values_t = scratch.values_t.reserve(box.transposed_count(shape.row_lanes));
  Real* keys = scratch.keys.reserve(box.natural_count());
  Real* d_keys = scratch.d_keys.reserve(box.natural_count());
  Real* d_values = scratch.d_values.reserve(box.natural_count());
  Real* rows = scratch.rows.reserve(row_queries(unit, tiles, tiles_end) * lanes);
  Real* d_outs = scratch.d_outs.reserve(row_queries(unit, tiles, tiles_end) * lanes);
  Real* d_q = scratch.results.reserve(QUERY_BLOCK * lanes);
  const BiasTable table(plan);

  const auto pack = [&](int z, int y) {
    const int row = box.row(z, y);
    const int64_t natural = box.natural(row), transposed = box.transposed(row), count = int64_t(box.width) * lanes;
    std::fill(d_keys + natural, d_keys + natural + count, Real(0));
    std::fill(d_values + natural, d_values + natural + count, Real(0));
    const bool keys_finite = pack_row<E>(plan, unit, box, a.k, z, y, keys + natural, keys_t + transposed, block);
    return pack_row<E>(plan, unit, box, a.v, z, y, nullptr, values_t + transposed, block) && keys_finite;
  };
  const auto leave = [&](int z, int y) {
    const int at[3] = {z, y, 0};
    if (cut < 2 && (at[cut] < own_first[cut] || at[cut] >= own_end[cut])) return;
    E* d_k = static_cast<E*>(a.d_k.data) + unit.offset(a, a.d_k, z, y, own_first[2]);
    E* d_v = static_cast<E*>(a.d_v.data) + unit.offset(a, a.d_v, z, y, own_first[2]);
    int64_t from = box.natural(box.row(z, y)) + int64_t(own_first[2] - box.first[2]) * lanes;
    for (int x = own_first[2]; x < own_end[2]; ++x, from += lanes) {
      prefetch_row_to_write(d_k + plan.prefetch_step(a.d_k), box.dims);
      prefetch_row_to_write(d_v + plan.prefetch_step(a.d_v), box.dims);
      write_row(d_k, box.dims, Real(1), d_keys + from);
      write_row(d_v, box.dims, Real(1), d_values + from);
      d_k += a.d_k.token[2] * a.dilation[2];
      d_v += a.d_v.token[2] * a.dilation[2];
    }
  };
  RowRing<decltype(pack), decltype(leave)> ring(plan, box, scratch, pack, leave);
  const auto begin = [&](const Span& z, const Span& y) {
    // A query that is not finite would reach, times 0, keys that its tile holds and its window does not.
    const bool q = gather_queries<E>(plan, unit, a.q, z, y, tiles[2], tiles_end[2], Real(a.scale), rows);
    const bool d = gather_queries<E>(plan, unit, a.d_out, z, y, tiles[2], tiles_end[2], Real(1), d_outs);
    return ring.advance(z, y) && q && d;
  };
  TileRows tile_rows;
  const auto new_rows = [&](const Tile& tile) { tile_rows = TileRows(shape, tile, box, scratch); };
  over_tiles(plan, unit, tiles, tiles_end, begin, new_rows, [&](const Tile& tile, int before) {
    const bool is_own = tile.span[cut].query >= own_first[cut] && tile.span[cut].query < own_end[cut];
    const int vectors = tile.lanes / LANES, queries = tile.queries();
    const int64_t shift = tile.span[2].key - box.first[2];
    KeyRows key_rows = tile_rows.keys;
    key_rows.width = tile.span[2].keys();
    Real* scores = scratch.scores.reserve(int64_t(3) * QUERY_BLOCK * tile.lanes);
    Real* products = scores + int64_t(QUERY_BLOCK) * tile.lanes;
    Real* dropped = a.has_dropout ? products + int64_t(QUERY_BLOCK) * tile.lanes : scores;
    const int blocks = (queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
    for (int b = 0; b < blocks; ++b) {
      const int from = queries * b / blocks, count = queries * (b + 1) / blocks - from;
      int at[QUERY_BLOCK][3];
      for (int i = 0; i < count; ++i) {
        tile.position(from + i, at[i]);
        if (!is_own) continue;
        const int64_t offset = unit.offset(a, a.d_q, at[i][0], at[i][1], at[i][2]);
        prefetch_row_to_write(static_cast<E*>(a.d_q.data) + offset, box.dims);
      }
      const Real* q = rows + int64_t(before + from) * lanes;
      const Real* d_out = d_outs + int64_t(before + from) * lanes;
      score<PAIRED>(count, q, lanes, box.dims, keys_t + shift, tile_rows.columns, box.column_pitch, vectors, nullptr,
                    scores, tile.lanes);
      score<PAIRED>(count, d_out, lanes, box.dims, values_t + shift, tile_rows.columns, box.column_pitch, vectors,
                    nullptr, products, tile.lanes);
      for (int i = 0; i < count; ++i) {
        const auto [z, y, x] = at[i];
        const LaneWindow window = tile.window(unit, at[i]);
        const int64_t origin = table.origin(plan, tile, at[i]);
        const int64_t row = (int64_t(unit.image) * a.heads + unit.head) * a.length[0] * a.length[1] * a.length[2] +
                            unit.token(a, z, y, x);
        const DropoutRow dropout(a.seed, row);
        const Real saved = static_cast<const Real*>(a.lse.data)[unit.offset(a, a.lse, z, y, x)];
        // The softmax of an infinite score is NaN everywhere, not 0 at the other keys.
        const Real lse = saved + (saved - saved);
        const Real d_lse =
            a.d_lse.data ? static_cast<const Real*>(a.d_lse.data)[unit.offset(a, a.d_lse, z, y, x)] : Real(0);
        const int64_t score_at = int64_t(i) * tile.lanes;
        softmax_backward<PAIRED>(plan, tile, window, table, a.rpb ? head_bias + origin : nullptr,
                                 a.has_dropout ? &dropout : nullptr, lse, d_lse, scores + score_at,
                                 products + score_at, dropped + score_at);
        if (a.d_rpb && is_own) {
          add_bias_gradient<PAIRED>(plan, tile, window, table, products + score_at, scratch.d_bias.data() + origin);
        }
      }
      if (is_own) {
        weigh(count, products, tile.lanes, key_rows, keys + shift * lanes, d_q);
        for (int i = 0; i < count; ++i) {
          const int64_t offset = unit.offset(a, a.d_q, at[i][0], at[i][1], at[i][2]);
          write_row(static_cast<E*>(a.d_q.data) + offset, box.dims, Real(a.scale), d_q + i * lanes);
        }
      }
      scatter(count, products, tile.lanes, key_rows, q, d_keys + shift * lanes);
      scatter(count, dropped, tile.lanes, key_rows, d_out, d_values + shift * lanes);
    }
  });

  ring.leave_until(box.end[ring.axis()]);
}

// Runs unit(Unit, the next Unit, bias of its head, Scratch) on all of them and sums their bias gradients; `table` says how
// a head's bias is laid out, there and here.
template <class Table, class F>
inline void backward_units(const Plan& plan, const Table& table, F&& unit) {
  const Arguments& a = plan.a;
  // Each task sums the bias gradient over its own units; how many there are depends on the problem alone.
  constexpr int64_t enough_tasks = 64;
  const int64_t units = plan.units_per_head();
  const int64_t parts = std::min(units, (enough_tasks + a.heads - 1) / a.heads);
  const int64_t tasks = parts * a.heads;
  const int64_t entries = int64_t(plan.rpb_rows[0]) * plan.rpb_rows[1] * plan.rpb_rows[2];
  std::vector<Real> partial(a.d_rpb ? tasks * entries : 0);
  Failure failure;
#pragma omp parallel num_threads(int(std::min<int64_t>(a.threads, tasks)))
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      failure.guard([&] {
        const int head = task % a.heads;
        const int64_t part = task / a.heads;
        const int64_t end = units * (part + 1) / parts;
        if (a.rpb) table.read(plan, head, scratch.bias.reserve(table.count()));
        if (a.d_rpb) {
          Real* d_bias = scratch.d_bias.reserve(table.count());
          std::fill(d_bias, d_bias + table.count(), Real(0));
        }
        for (int64_t index = units * part / parts; index < end; ++index) {
          const int64_t next = std::min(index + 1, end - 1);
          unit(Unit(plan, index, head), Unit(plan, next, head), a.rpb ? scratch.bias.data() : nullptr, scratch);
        }
        if (a.d_rpb) table.add(plan, scratch.d_bias.data(), partial.data() + task * entries);
      });
    }
  }
  failure.raise();
  if (!a.d_rpb) return;
  for (int64_t i = 0; i < a.heads * entries; ++i) a.d_rpb[i] = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    Real* to = a.d_rpb + task % a.heads * entries;
    for (int64_t i = 0; i < entries; ++i) to[i] += partial[task * entries + i];
  }
}

template <class E, bool PAIRED>
inline void backward(const Plan& plan) {
  backward_units(plan, BiasTable(plan), [&](const Unit& unit, const Unit&, const Real* bias, Scratch& scratch) {
    backward_unit<E, PAIRED>(plan, unit, bias, scratch);
  });
}

template <class E>
inline void dense_backward(const Plan& plan) {
  const DensePlan dense(plan);
  const DenseTokens tokens(dense);
  backward_units(plan, dense, [&](const Unit& unit, const Unit& next, const Real* bias, Scratch& scratch) {
    dense_backward_unit<E>(dense, tokens, unit, next, bias, scratch);
  });
}

}  // namespace natrain
