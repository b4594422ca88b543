// out and lse: per block of queries, scores of the whole tile, softmax, weighted sum. Nothing outlives the block.
#pragma once

#include "dense_forward.h"

namespace natrain {

// scores -> probabilities times their sum, in place; returns that sum and the scores' maximum.
template <bool PAIRED>
inline void softmax(const Plan& plan, const Tile& tile, const LaneWindow& w, const BiasTable& table, const Real* bias,
                    Real* scores, Real& sum, Real& most) {
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  Vector highest = broadcast(-infinity);
  over_vectors<PAIRED>(plan.shape, tile, w, [&](int vector, unsigned mask, int z, int y, int x) {
    Vector s = load(scores + vector * LANES);
    if (bias) s += bias_vector<PAIRED>(table, bias, z, y, x);
    s = select(mask, s, broadcast(-infinity));
    highest = maximum(s, highest);
    store(scores + vector * LANES, s);
  });
  most = max_lanes(highest);
  Vector total = {};
  for (int at = 0; at < tile.lanes; at += LANES) {
    const Vector p = exponential(load(scores + at) - most);
    total += p;
    store(scores + at, p);
  }
  sum = sum_lanes(total);
}

// The same for tiles of one plane whose rows are a vector or half of one, with all scores in registers.
template <bool PAIRED, int VECTORS>
inline void small_softmax(const LaneWindow& w, const BiasTable& table, const Real* bias, Real* scores, Real& sum,
                          Real& most) {
  constexpr int step = PAIRED ? 2 : 1;
  const unsigned lanes = lane_range(w.x, w.x_end), rows = (1u << w.y_end) - (1u << w.y);
  Vector s[VECTORS], highest = broadcast(-std::numeric_limits<Real>::infinity());
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    unsigned mask = rows >> step * v & 1 ? lanes : 0;
    if (PAIRED) mask |= rows >> (step * v + 1) & 1 ? lanes << LANES / 2 : 0;
    s[v] = load(scores + v * LANES);
    if (bias) s[v] += bias_vector<PAIRED>(table, bias, 0, step * v, 0);
    s[v] = select(mask, s[v], broadcast(-std::numeric_limits<Real>::infinity()));
    highest = maximum(s[v], highest);
  }
  most = max_lanes(highest);
  Vector total = {};
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    const Vector p = exponential(s[v] - most);
    total += p;
    store(scores + v * LANES, p);
  }
  sum = sum_lanes(total);
}

// Clears the probabilities that dropout does not keep.
template <bool PAIRED>
inline void drop(const Plan& plan, const Tile& tile, const LaneWindow& w, const DropoutRow& row, Real* probs) {
  over_vectors<PAIRED>(plan.shape, tile, w, [&](int vector, unsigned mask, int z, int y, int x) {
    Real* p = probs + vector * LANES;
    store(p, select(kept_lanes(plan, row, w, mask, PAIRED, z, y, x), load(p), Vector{}));
  });
}

template <class E, bool PAIRED>
inline void forward_unit(const Plan& plan, const Unit& unit, const Real* head_bias, Scratch& scratch) {
  const Arguments& a = plan.a;
  if (unit.is_empty(a.slab_axis)) return;
  int first[3], end[3];
  for (int axis = 0; axis < 3; ++axis) {
    first[axis] = unit.axes[axis]->tiles[unit.tiles[axis]].key;
    end[axis] = unit.axes[axis]->tiles[unit.tiles_end[axis] - 1].key_end;
  }
  const PackedBox box(plan, first, end);
  const TileShape& shape = plan.shape;
  const int lanes = box.dim_lanes;
  Real* block = scratch.block.reserve(LANES * lanes);
  Real* keys_t = scratch.keys_t.reserve(box.transposed_count(shape.row_lanes));
  Real* values = scratch.values.reserve(box.natural_count());
  Real* rows = scratch.rows.reserve(row_queries(unit, unit.tiles, unit.tiles_end) * lanes);
  Real* out = scratch.results.reserve(QUERY_BLOCK * lanes);
  const BiasTable table(plan);

  const auto pack = [&](int z, int y) {
    const int row = box.row(z, y);
    const bool keys_finite =
        pack_row<E>(plan, unit, box, a.k, z, y, nullptr, keys_t + box.transposed(row), block);
    return pack_row<E>(plan, unit, box, a.v, z, y, values + box.natural(row), nullptr, block) && keys_finite;
  };
  const auto leave = [](int, int) {};
  RowRing<decltype(pack), decltype(leave)> ring(plan, box, scratch, pack, leave);
  const auto begin = [&](const Span& z, const Span& y) {
    gather_queries<E>(plan, unit, a.q, z, y, unit.tiles[2], unit.tiles_end[2], Real(a.scale), rows);
    return ring.advance(z, y);
  };
  TileRows tile_rows;
  const auto new_rows = [&](const Tile& tile) { tile_rows = TileRows(shape, tile, box, scratch); };
  over_tiles(plan, unit, unit.tiles, unit.tiles_end, begin, new_rows, [&](const Tile& tile, int before) {
    const int vectors = tile.lanes / LANES, queries = tile.queries();
    const int64_t shift = tile.span[2].key - box.first[2];
    KeyRows keys = tile_rows.keys;
    keys.width = tile.span[2].keys();
    constexpr int most_small = 8;
    const bool is_small = shape.row_lanes <= LANES && tile.span[0].keys() == 1 && vectors <= most_small;
    Real* scores = scratch.scores.reserve(int64_t(QUERY_BLOCK) * tile.lanes);
    const int blocks = (queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
    for (int b = 0; b < blocks; ++b) {
      const int from = queries * b / blocks, count = queries * (b + 1) / blocks - from;
      int at[QUERY_BLOCK][3];
      for (int i = 0; i < count; ++i) {
        tile.position(from + i, at[i]);
        const int64_t out_at = unit.offset(a, a.out, at[i][0], at[i][1], at[i][2]);
        prefetch_row_to_write(static_cast<E*>(a.out.data) + out_at, box.dims);
      }
      const Real* q = rows + int64_t(before + from) * lanes;
      score<PAIRED>(count, q, lanes, box.dims, keys_t + shift, tile_rows.columns, box.column_pitch, vectors, nullptr,
                    scores, tile.lanes);
      Real sum[QUERY_BLOCK], most[QUERY_BLOCK];
      for (int i = 0; i < count; ++i) {
        const Real* bias = a.rpb ? head_bias + table.origin(plan, tile, at[i]) : nullptr;
        const LaneWindow window = tile.window(unit, at[i]);
        Real* probs = scores + int64_t(i) * tile.lanes;
        if (is_small) {
          with_count<most_small>(vectors, [&](auto v) {
            small_softmax<PAIRED, v()>(window, table, bias, probs, sum[i], most[i]);
          });
        } else {
          softmax<PAIRED>(plan, tile, window, table, bias, probs, sum[i], most[i]);
        }
        if (!a.has_dropout) continue;
        const int64_t row = (int64_t(unit.image) * a.heads + unit.head) * a.length[0] * a.length[1] * a.length[2] +
                            unit.token(a, at[i][0], at[i][1], at[i][2]);
        drop<PAIRED>(plan, tile, window, DropoutRow(a.seed, row), probs);
      }
      weigh(count, scores, tile.lanes, keys, values + shift * lanes, out);
      for (int i = 0; i < count; ++i) {
        const int64_t out_at = unit.offset(a, a.out, at[i][0], at[i][1], at[i][2]);
        write_row(static_cast<E*>(a.out.data) + out_at, box.dims, Real(a.keep_scale) / sum[i], out + i * lanes);
        static_cast<Real*>(a.lse.data)[unit.offset(a, a.lse, at[i][0], at[i][1], at[i][2])] = log_sum(sum[i], most[i]);
      }
    }
  });
}

// Runs unit(Unit, the next Unit, bias of its head, Scratch) on all of them; `table` says how a head's bias is laid out.
template <class Table, class F>
inline void forward_units(const Plan& plan, const Table& table, F&& unit) {
  const Arguments& a = plan.a;
  const int64_t units = plan.units_per_head() * a.heads;
  const int threads = int(std::min<int64_t>(a.threads, units));
  // Heads innermost, and several to a thread: they are neighbours in memory.
  const int64_t run = std::max<int64_t>(1, std::min(a.heads, units / (8 * threads)));
  const auto make = [&](int64_t index) { return Unit(plan, index / a.heads, index % a.heads); };
  Failure failure;
  Buffer<Real> bias;
  if (a.rpb) bias.reserve(a.heads * table.count());
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
    if (a.rpb) {
#pragma omp for
      for (int64_t head = 0; head < a.heads; ++head) table.read(plan, head, bias.data() + head * table.count());
    }
#pragma omp for schedule(dynamic, run)
    for (int64_t index = 0; index < units; ++index) {
      const Real* head_bias = a.rpb ? bias.data() + index % a.heads * table.count() : nullptr;
      failure.guard([&] { unit(make(index), make(std::min(index + 1, units - 1)), head_bias, scratch); });
    }
  }
  failure.raise();
}

template <class E, bool PAIRED>
inline void forward(const Plan& plan) {
  forward_units(plan, BiasTable(plan), [&](const Unit& unit, const Unit&, const Real* bias, Scratch& scratch) {
    forward_unit<E, PAIRED>(plan, unit, bias, scratch);
  });
}

template <class E>
inline void dense_forward(const Plan& plan) {
  const DensePlan dense(plan);
  const DenseTokens tokens(dense);
  forward_units(plan, dense, [&](const Unit& unit, const Unit& next, const Real* bias, Scratch& scratch) {
    dense_forward_unit<E>(dense, tokens, unit, next, bias, scratch);
  });
}

}  // namespace natrain
