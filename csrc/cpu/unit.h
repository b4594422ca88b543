// The keys of one unit, packed once as Reals, and the walk over its tiles.
#pragma once

#include <cmath>
#include <limits>

#include "memory.h"
#include "problem.h"
#include "products.h"

namespace natrain {

// Where the keys [first, end) per axis lie in packed buffers. Rows run along x. Along the axis that a unit walks, z or y,
// only as many positions are kept as the tiles at one position see: the buffers are rings that stay in the second-level
// cache, whatever the size of the image.
struct PackedBox {
  int first[3], end[3], kept[3];
  int width, dims, dim_lanes;
  int64_t column_pitch;  // of transposed rows: from one component of head_dim to the next

  PackedBox(const Plan& plan, const int (&from)[3], const int (&to)[3]) : width(to[2] - from[2]) {
    for (int axis = 0; axis < 3; ++axis) {
      first[axis] = from[axis], end[axis] = to[axis];
      kept[axis] = to[axis] - from[axis];
      if (axis == plan.a.slab_axis && axis < 2) kept[axis] = std::min(kept[axis], plan.shape.most_keys[axis]);
    }
    dims = plan.a.head_dim;
    dim_lanes = plan.dim_lanes;
    // An odd number of vectors, so that the components of a key do not fall into the same few cache sets.
    column_pitch = round_up(width, LANES);
    if (column_pitch / LANES % 2 == 0) column_pitch += LANES;
  }

  int rows() const { return kept[0] * kept[1]; }
  int row(int z, int y) const { return (z - first[0]) % kept[0] * kept[1] + (y - first[1]) % kept[1]; }
  // A block of keys may be read past the last.
  int64_t natural_count() const { return (int64_t(rows()) * width + LANES) * dim_lanes; }
  // The last row may be read past its end by a tile's unused lanes.
  int64_t transposed_count(int row_lanes) const { return int64_t(rows()) * dims * column_pitch + row_lanes + LANES; }
  int64_t natural(int row) const { return int64_t(row) * width * dim_lanes; }
  int64_t transposed(int row) const { return int64_t(row) * dims * column_pitch; }
};

// LANES rows of head_dim components become columns. A short block transposes what follows it too, into columns that nobody
// uses.
inline void transpose_block(const Real* from, int lanes, int dims, Real* to, int64_t pitch) {
  for (int d = 0; d < lanes; d += LANES) {
    Vector rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = load(from + i * lanes + d);
    transpose(rows);
    Real* out = to + d * pitch;
    if (d + LANES <= dims) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(out + i * pitch, rows[i]);
    } else {
      for (int i = 0; i < dims - d; ++i) store(out + i * pitch, rows[i]);
    }
  }
}

// Copies the keys of row (z, y) into `natural` [x][D] and / or `transposed` [D][x] and says whether they are finite:
// 0 * inf would carry what is not to queries that do not attend to it. `block` has room for LANES keys.
template <class E>
inline bool pack_row(const Plan& plan, const Unit& unit, const PackedBox& box, const TensorArgument& tensor, int z, int y,
                     Real* natural, Real* transposed, Real* block) {
  const int dims = box.dims, lanes = box.dim_lanes;
  const int64_t step = tensor.token[2] * plan.a.dilation[2], ahead = plan.prefetch_step(tensor);
  const E* from = static_cast<const E*>(tensor.data) + unit.offset(plan.a, tensor, z, y, box.first[2]);
  Vector check = {};
  for (int x = 0; x < box.width; x += LANES) {
    const int count = std::min(LANES, box.width - x);
    Real* to = natural ? natural + int64_t(x) * lanes : block;
    for (int i = 0; i < count; ++i, from += step) {
      prefetch_row(from + ahead, dims);
      read_row(from, dims, Real(1), to + i * lanes);
      for (int d = 0; d < lanes; d += LANES) check += load(to + i * lanes + d) * Real(0);
    }
    if (!transposed) continue;
    transpose_block(to, lanes, dims, transposed + x, box.column_pitch);
  }
  return sum_lanes(check) == 0;
}

// A query's window as lanes and rows of its tile.
struct LaneWindow {
  int z, z_end, y, y_end, x, x_end;
};

// The queries of three spans, and the keys they attend to together.
struct Tile {
  Span span[3];
  int queries() const { return span[0].queries() * span[1].queries() * span[2].queries(); }
  int rows_y, lanes;  // rows along y, padded; lanes of scores

  Tile(const TileShape& shape, const Span& z, const Span& y, const Span& x) : span{z, y, x} {
    rows_y = shape.padded_rows(y.keys());
    lanes = round_up(z.keys() * rows_y * shape.row_lanes, LANES);
  }

  void position(int query, int (&at)[3]) const {
    at[2] = span[2].query + query % span[2].queries();
    query /= span[2].queries();
    at[1] = span[1].query + query % span[1].queries();
    at[0] = span[0].query + query / span[1].queries();
  }

  LaneWindow window(const Unit& unit, const int (&at)[3]) const {
    const auto start = [&](int axis) { return unit.axes[axis]->start[at[axis]] - span[axis].key; };
    const auto end = [&](int axis) { return unit.axes[axis]->end[at[axis]] - span[axis].key; };
    return {start(0), end(0), start(1), end(1), start(2), end(2)};
  }
};

// The bias of one head as Reals, with margins on all sides as wide as a tile may reach beyond a query's window, so that
// whole vectors are read and masked afterwards.
struct BiasTable {
  int margin[3], pitch, rows_y, rows_z;

  explicit BiasTable(const Plan& plan) {
    for (int axis = 0; axis < 2; ++axis) margin[axis] = plan.shape.most_keys[axis] - plan.a.kernel_size[axis] + 1;
    margin[2] = plan.shape.row_lanes + LANES;
    rows_z = plan.rpb_rows[0] + 2 * margin[0];
    rows_y = plan.rpb_rows[1] + 2 * margin[1];
    pitch = round_up(plan.rpb_rows[2] + 2 * margin[2], LANES);
  }

  int64_t count() const { return int64_t(rows_z) * rows_y * pitch; }

  int64_t row(int z, int y) const { return (int64_t(z + margin[0]) * rows_y + y + margin[1]) * pitch + margin[2]; }

  // Lane 0 of row (z, y) = (0, 0) of a tile, for the query at `at`.
  int64_t origin(const Plan& plan, const Tile& tile, const int (&at)[3]) const {
    const auto offset = [&](int axis) { return tile.span[axis].key - at[axis] + int(plan.a.kernel_size[axis]) - 1; };
    return row(offset(0), offset(1)) + offset(2);
  }

  void read(const Plan& plan, int head, Real* table) const {
    const int *size = plan.rpb_rows;
    std::fill(table, table + count(), Real(0));
    const Real* from = plan.a.rpb + int64_t(head) * size[0] * size[1] * size[2];
    for (int z = 0; z < size[0]; ++z) {
      for (int y = 0; y < size[1]; ++y, from += size[2]) std::copy(from, from + size[2], table + row(z, y));
    }
  }

  void add(const Plan& plan, const Real* table, Real* to) const {
    const int *size = plan.rpb_rows;
    for (int z = 0; z < size[0]; ++z) {
      for (int y = 0; y < size[1]; ++y, to += size[2]) {
        for (int x = 0; x < size[2]; ++x) to[x] += table[row(z, y) + x];
      }
    }
  }
};

// Calls f(vector index, lane mask, row z, y, lane x) for every vector of a tile's scores; a mask's bits are the lanes that
// hold keys of the query's window.
template <bool PAIRED, class F>
inline void over_vectors(const TileShape& shape, const Tile& tile, const LaneWindow& w, F&& f) {
  constexpr int half = LANES / 2, step = PAIRED ? 2 : 1;
  const int planes = tile.span[0].keys(), rows = tile.rows_y, row_lanes = shape.row_lanes;
  const unsigned narrow_mask = lane_range(w.x, w.x_end);
  int vector = 0;
  for (int z = 0; z < planes; ++z) {
    const bool has_z = z >= w.z && z < w.z_end;
    const int first = has_z ? w.y : 0, past = has_z ? w.y_end : 0;
    for (int y = 0; y < rows; y += step) {
      const bool has_row = unsigned(y - first) < unsigned(past - first);
      const unsigned low = has_row ? narrow_mask : 0u;
      if constexpr (PAIRED) {
        const unsigned high = unsigned(y + 1 - first) < unsigned(past - first) ? narrow_mask << half : 0u;
        f(vector++, low | high, z, y, 0);
      } else if (row_lanes == LANES) {
        f(vector++, low, z, y, 0);
      } else {
        for (int x = 0; x < row_lanes; x += LANES) f(vector++, has_row ? lane_range(w.x - x, w.x_end - x) : 0u, z, y, x);
      }
    }
  }
}

// The bias of the lanes that over_vectors names; lanes outside the mask are anything.
template <bool PAIRED>
inline Vector bias_vector(const BiasTable& table, const Real* origin, int z, int y, int x) {
  const Real* low = origin + int64_t(z * table.rows_y + y) * table.pitch + x;
  return PAIRED ? load_pair(low, low + table.pitch) : load(low);
}

// Which lanes dropout keeps.
inline unsigned kept_lanes(const Plan& plan, const DropoutRow& row, const LaneWindow& w, unsigned mask, bool is_paired,
                           int z, int y, int x) {
  const Arguments& a = plan.a;
  unsigned kept = 0;
  const int width = is_paired ? LANES / 2 : LANES;
  for (int lane = 0; lane < LANES; ++lane) {
    const int row_y = y + lane / width - w.y, column = x + lane % width - w.x;
    const int slot = ((z - w.z) * int(a.kernel_size[1]) + row_y) * int(a.kernel_size[2]) + column;
    kept |= unsigned(row.keeps(slot, unsigned(a.drop_threshold))) << lane;
  }
  return kept & mask;
}

// Queries of the longest row of tiles.
inline int64_t row_queries(const Unit& unit, const int (&from)[3], const int (&to)[3]) {
  const auto most = [&](int axis) {
    int queries = 0;
    for (int t = from[axis]; t < to[axis]; ++t) queries = std::max(queries, unit.axes[axis]->tiles[t].queries());
    return int64_t(queries);
  };
  return most(0) * most(1) * unit.axes[2]->n;
}

// One thread's memory.
struct Scratch {
  Buffer<Real> keys_t, values_t, keys, values, d_keys, d_values, bias, d_bias, block, rows, d_outs, results, scores;
  Buffer<uint8_t> is_unsafe;
  Buffer<int64_t> key_column, row_first;
  Buffer<int> row_lane;
};

// The log of the sum of exp(scores). An infinite score makes the probabilities NaN, but this infinite.
inline Real log_sum(Real sum, Real most) {
  return most == std::numeric_limits<Real>::infinity() ? most : most + std::log(sum);
}

// Where the keys of a tile's rows lie, for tiles at x = box.first: elsewhere everything moves by a constant.
struct TileRows {
  const int64_t* columns;  // in transposed buffers, of every vector of the scores (in pairs: of every half)
  KeyRows keys;            // in natural buffers

  TileRows() = default;
  TileRows(const TileShape& shape, const Tile& tile, const PackedBox& box, Scratch& scratch) {
    const Span &z = tile.span[0], &y = tile.span[1];
    const int count = z.keys() * y.keys(), step = shape.is_paired ? shape.row_lanes : LANES;
    int64_t* column = scratch.key_column.reserve(int64_t(z.keys()) * tile.rows_y * (shape.row_lanes / step));
    int64_t* first = scratch.row_first.reserve(count);
    int* lane = scratch.row_lane.reserve(count);
    columns = column;
    keys = {count, 0, box.dim_lanes, 1, lane, first};
    for (int kz = 0; kz < z.keys(); ++kz) {
      for (int ky = 0; ky < tile.rows_y; ++ky) {
        const int row = box.row(z.key + kz, std::min(y.key + ky, y.key_end - 1));
        for (int x = 0; x < shape.row_lanes; x += step) *column++ = box.transposed(row) + x;
        if (ky >= y.keys()) continue;
        *lane++ = (kz * tile.rows_y + ky) * shape.row_lanes;
        *first++ = box.natural(row);
      }
    }
  }
};

// Copies the queries of the tiles [from, to) along x, scaled, in the order in which the tiles go over them. Reading them
// well before they are used hides the memory's latency: tokens lie too far apart for the processor to foresee. Returns
// whether all are finite.
template <class E>
inline bool gather_queries(const Plan& plan, const Unit& unit, const TensorArgument& tensor, const Span& z,
                           const Span& y, int from, int to, Real factor, Real* rows) {
  const int64_t step = tensor.token[2] * plan.a.dilation[2], ahead = plan.prefetch_step(tensor);
  const int lanes = plan.dim_lanes;
  Vector check = {};
  for (int tx = from; tx < to; ++tx) {
    const Span& x = unit.axes[2]->tiles[tx];
    for (int qz = z.query; qz < z.query_end; ++qz) {
      for (int qy = y.query; qy < y.query_end; ++qy) {
        const E* row = static_cast<const E*>(tensor.data) + unit.offset(plan.a, tensor, qz, qy, x.query);
        for (int qx = x.query; qx < x.query_end; ++qx, row += step, rows += lanes) {
          prefetch_row(row + ahead, plan.a.head_dim);
          read_row(row, plan.a.head_dim, factor, rows);
          for (int d = 0; d < lanes; d += LANES) check += load(rows + d) * Real(0);
        }
      }
    }
  }
  return sum_lanes(check) == 0;
}

// Walks the tiles [from, to) of a unit: for every row of tiles along x, begin(z, y) says whether all that they read is
// finite; then new_rows(tile) before tiles on new rows of keys, and f(tile, queries of this row of tiles before it). Tiles
// that read what is not finite are cut into single queries, whose keys are exactly their own window.
template <class Begin, class NewRows, class F>
inline void over_tiles(const Plan& plan, const Unit& unit, const int (&from)[3], const int (&to)[3], Begin&& begin,
                       NewRows&& new_rows, F&& f) {
  const auto& axes = unit.axes;
  for (int tz = from[0]; tz < to[0]; ++tz) {
    for (int ty = from[1]; ty < to[1]; ++ty) {
      const Span &z = axes[0]->tiles[tz], &y = axes[1]->tiles[ty];
      const bool is_finite = begin(z, y);
      if (is_finite) new_rows(Tile(plan.shape, z, y, axes[2]->tiles[from[2]]));
      int before = 0;
      for (int tx = from[2]; tx < to[2]; ++tx) {
        const Span& x = axes[2]->tiles[tx];
        if (is_finite) {
          f(Tile(plan.shape, z, y, x), before);
          before += z.queries() * y.queries() * x.queries();
          continue;
        }
        for (int qz = z.query; qz < z.query_end; ++qz) {
          for (int qy = y.query; qy < y.query_end; ++qy) {
            for (int qx = x.query; qx < x.query_end; ++qx) {
              const Tile one(plan.shape, axes[0]->span(qz, qz + 1), axes[1]->span(qy, qy + 1),
                             axes[2]->span(qx, qx + 1));
              new_rows(one);
              f(one, before++);
            }
          }
        }
      }
    }
  }
}

// The rows of keys of one unit as the walk needs them: pack(z, y) -> is finite once a row before the first tile that sees
// it, leave(z, y) after the last.
template <class Pack, class Leave>
struct RowRing {
  const Plan& plan;
  const PackedBox& box;
  uint8_t* is_unsafe;
  Pack pack;
  Leave leave;
  int packed, left;  // positions along the walked axis

  RowRing(const Plan& p, const PackedBox& b, Scratch& scratch, Pack pack_row, Leave leave_row)
      : plan(p), box(b), is_unsafe(scratch.is_unsafe.reserve(b.rows())), pack(pack_row), leave(leave_row) {
    packed = left = box.first[axis()];
  }

  // x is never walked: then everything is one step along y, which has length 1.
  int axis() const { return std::min<int>(plan.a.slab_axis, 1); }

  template <class F>
  void each_row(int position, F&& f) {
    if (axis() == 1) return f(0, position);
    for (int y = box.first[1]; y < box.end[1]; ++y) f(position, y);
  }

  void leave_until(int position) {
    for (; left < position; ++left) each_row(left, leave);
  }

  // Returns whether all rows that tiles at (z, y) see are finite.
  bool advance(const Span& z, const Span& y) {
    const Span& here = axis() == 0 ? z : y;
    leave_until(here.key);
    for (; packed < here.key_end; ++packed) {
      each_row(packed, [&](int pz, int py) { is_unsafe[box.row(pz, py)] = !pack(pz, py); });
    }
    bool is_finite = true;
    for (int kz = z.key; kz < z.key_end; ++kz) {
      for (int ky = y.key; ky < y.key_end; ++ky) is_finite = is_finite && !is_unsafe[box.row(kz, ky)];
    }
    return is_finite;
  }
};

}  // namespace natrain
