// The argument of a call, and how its tokens are cut into units (one image, head, dilation group, slab) and tiles.
//
// Axes are always z, y, x; a problem of lower rank has leading axes of length 1 and kernel size 1. Inside a unit all
// arithmetic is in positions of its dilation group.
#pragma once

#include <algorithm>
#include <vector>

#include "dropout.h"
#include "element.h"
#include "window.h"

namespace natrain {

// [B, Z, Y, X, N, (D)]: strides in elements, the last axis contiguous.
struct TensorArgument {
  void* data;
  int64_t batch, token[3], head;
};

// Filled by natrain/ops/cpu.py; every member has 8 bytes.
struct Arguments {
  int64_t batch, heads, head_dim;
  int64_t length[3], kernel_size[3], dilation[3], stride[3], is_causal[3];
  int64_t slab_axis;  // the outermost axis that is longer than 1 by rank: 0, 1 or 2
  int64_t element;    // 0 Real, 1 bfloat16, 2 float16
  int64_t threads;
  double scale, keep_scale;  // keep_scale: 1 / (1 - dropout_p)
  int64_t has_dropout, drop_threshold, seed;
  const Real* rpb;  // [N, 2k-1, ...] or null
  Real* d_rpb;      // likewise
  TensorArgument q, k, v, out, lse;
  TensorArgument d_out, d_lse, d_q, d_k, d_v;  // backward; d_lse.data may be null
};

// Queries [query, query_end) whose windows together are the keys [key, key_end).
struct Span {
  int query, query_end, key, key_end;
  int queries() const { return query_end - query; }
  int keys() const { return key_end - key; }
};

// One axis of a dilation group of n tokens.
struct AxisPlan {
  int n;
  std::vector<int> start, end;  // of each query's window
  std::vector<Span> tiles;

  Span span(int query, int query_end) const { return {query, query_end, start[query], end[query_end - 1]}; }
};

inline int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

inline AxisPlan make_axis(const Arguments& a, int axis, int group) {
  AxisPlan plan;
  plan.n = group_length(a.length[axis], a.dilation[axis], group);
  for (int p = 0; p < plan.n; ++p) {
    plan.start.push_back(window_start(p, plan.n, a.kernel_size[axis], a.stride[axis], a.is_causal[axis]));
    plan.end.push_back(window_end(p, plan.n, a.kernel_size[axis], a.stride[axis], a.is_causal[axis]));
  }
  return plan;
}

// Consecutive queries share a tile while their windows together have at most `most_keys` keys.
inline std::vector<Span> make_tiles(const AxisPlan& axis, int most_keys) {
  std::vector<Span> tiles;
  for (int p = 0; p < axis.n; ++p) {
    if (!tiles.empty() && axis.end[p] - tiles.back().key <= most_keys) {
      tiles.back() = axis.span(tiles.back().query, p + 1);
    } else {
      tiles.push_back(axis.span(p, p + 1));
    }
  }
  return tiles;
}

// Lanes a row of keys takes in a tile's scores, and the keys a tile may span along z and y.
struct TileShape {
  int row_lanes;
  bool is_paired;  // two rows of half a vector each
  int most_keys[3];

  // Rows along y of one z plane of a tile; pairs never straddle planes.
  int padded_rows(int rows) const { return is_paired ? round_up(rows, 2) : rows; }
};

// The shape that computes the fewest scores. A block of queries costs its lanes once for itself, and once more for every
// load it shares, hence the constant; the sum over tiles factorises over the axes.
inline TileShape choose_shape(const Arguments& a, const AxisPlan (&axes)[3]) {
  constexpr double load_cost = 1.5;
  TileShape best{};
  double best_cost = 0;
  const int kx = a.kernel_size[2], widest = round_up(std::min<int>(2 * kx, axes[2].n), LANES);
  const auto consider = [&](int row_lanes, bool is_paired, int keys_z, int keys_y) {
    const TileShape shape{row_lanes, is_paired, {keys_z, keys_y, row_lanes}};
    double work = 1, loads = 1;
    for (int axis = 0; axis < 3; ++axis) {
      double axis_work = 0, axis_loads = 0;
      for (const Span& tile : make_tiles(axes[axis], shape.most_keys[axis])) {
        const int keys = axis == 2 ? row_lanes : axis == 1 ? shape.padded_rows(tile.keys()) : tile.keys();
        axis_work += double(keys) * tile.queries();
        axis_loads += keys * std::max(1.0, tile.queries() / double(QUERY_BLOCK));
      }
      work *= axis_work;
      loads *= axis_loads;
    }
    const double cost = work + load_cost * loads;
    if (best.row_lanes == 0 || cost < best_cost) best = shape, best_cost = cost;
  };
  const int kz = a.kernel_size[0], ky = a.kernel_size[1];
  const int most_z = std::min(kz + 3, axes[0].n), most_y = std::min(ky + 5, axes[1].n);
  for (int keys_z = kz; keys_z <= most_z; ++keys_z) {
    for (int keys_y = ky; keys_y <= most_y; ++keys_y) {
      if (HAS_PAIRS && kx <= LANES / 2) consider(LANES / 2, true, keys_z, keys_y);
      const int narrowest = round_up(kx, LANES);
      for (int lanes = narrowest; lanes <= std::min(widest, narrowest + 2 * LANES); lanes += LANES) {
        consider(lanes, false, keys_z, keys_y);
      }
    }
  }
  return best;
}

// Token groups of an axis differ in length by at most 1, so two plans an axis serve them all.
struct Plan {
  const Arguments& a;
  AxisPlan axes[3][2];  // [axis][1 for the groups that are one token shorter]
  bool is_dense;    // see dense.h; else
  TileShape shape;
  int dim_lanes;    // head_dim in whole vectors
  int groups;
  int slabs = 1;
  int rpb_rows[3];  // 2k - 1

  explicit Plan(const Arguments& arguments) : a(arguments) {
    groups = 1;
    for (int axis = 0; axis < 3; ++axis) {
      groups *= a.dilation[axis];
      rpb_rows[axis] = 2 * a.kernel_size[axis] - 1;
      axes[axis][0] = make_axis(a, axis, 0);
      axes[axis][1] = make_axis(a, axis, a.dilation[axis] - 1);
    }
    dim_lanes = round_up(a.head_dim, LANES);
    is_dense = has_full_windows();
    if (is_dense) return;
    const AxisPlan longest[3] = {axes[0][0], axes[1][0], axes[2][0]};
    shape = choose_shape(a, longest);
    for (int axis = 0; axis < 3; ++axis) {
      for (AxisPlan& plan : axes[axis]) plan.tiles = make_tiles(plan, shape.most_keys[axis]);
    }
    slabs = count_slabs();
  }

  // Whether every window is its whole dilation group, and that small enough to be no tiles but one matrix.
  bool has_full_windows() const {
    constexpr int64_t most_keys = 128;
    int64_t keys = 1;
    for (const auto& [longest, shortest] : axes) {
      if (longest.n != shortest.n || longest.start.back() > 0 || longest.end.front() < longest.n) return false;
      keys *= longest.n;
    }
    return keys <= most_keys;
  }

  const AxisPlan& axis(int axis, int group) const {
    const AxisPlan& longest = axes[axis][0];
    return group_length(a.length[axis], a.dilation[axis], group) == longest.n ? longest : axes[axis][1];
  }

  // Cuts of a group along slab_axis: a function of the problem alone, so that no result depends on the threads. Enough
  // for many cores where images and heads are few, none shorter than two windows, since neighbouring slabs compute what
  // lies between them twice in backward. A sequence is also cut so that its packed keys stay in the second-level cache.
  int count_slabs() const {
    constexpr int64_t enough_units = 32, most_bytes = 128 << 10;
    const int64_t units = a.batch * a.heads * groups;
    const AxisPlan& cut = axes[a.slab_axis][0];
    const int64_t bytes = a.slab_axis == 2 ? int64_t(cut.n) * dim_lanes * sizeof(Real) : 0;
    const int64_t wanted = std::max((enough_units + units - 1) / units, bytes / most_bytes);
    const int64_t most = std::max<int64_t>(1, cut.n / (2 * a.kernel_size[a.slab_axis]));
    return int(std::min<int64_t>({wanted, most, int64_t(cut.tiles.size())}));
  }

  // Elements ahead of a token's row to ask the memory for: the next tokens, or where a unit is small the next head, which
  // is the next unit.
  int64_t prefetch_step(const TensorArgument& tensor) const {
    constexpr int64_t small_unit = 256, tokens_ahead = 16;
    const bool is_small = int64_t(axes[0][0].n) * axes[1][0].n * axes[2][0].n <= small_unit;
    return is_small ? tensor.head : tokens_ahead * tensor.token[2] * a.dilation[2];
  }

  int64_t units_per_head() const { return a.batch * groups * slabs; }
};

// One image, dilation group and slab of one head.
struct Unit {
  int image, head;
  int group[3];
  const AxisPlan* axes[3];
  int tiles[3], tiles_end[3];  // this unit's own

  Unit(const Plan& plan, int64_t index, int head_index) : head(head_index) {
    const Arguments& a = plan.a;
    const int slab = index % plan.slabs;
    index /= plan.slabs;
    for (int axis = 2; axis >= 0; --axis) {
      group[axis] = index % a.dilation[axis];
      index /= a.dilation[axis];
      axes[axis] = &plan.axis(axis, group[axis]);
      tiles[axis] = 0;
      tiles_end[axis] = axes[axis]->tiles.size();
    }
    image = index;
    const int cut = a.slab_axis, count = tiles_end[cut];
    tiles[cut] = int64_t(count) * slab / plan.slabs;
    tiles_end[cut] = int64_t(count) * (slab + 1) / plan.slabs;
  }

  bool is_empty(int cut) const { return tiles[cut] == tiles_end[cut]; }

  // Element (z, y, x, 0) of a tensor, positions of this unit's group.
  int64_t offset(const Arguments& a, const TensorArgument& t, int z, int y, int x) const {
    const int position[3] = {z, y, x};
    int64_t at = image * t.batch + head * t.head;
    for (int axis = 0; axis < 3; ++axis) at += (position[axis] * a.dilation[axis] + group[axis]) * t.token[axis];
    return at;
  }

  // The token's number in the image, as dropout counts it.
  int64_t token(const Arguments& a, int z, int y, int x) const {
    const int64_t tz = z * a.dilation[0] + group[0], ty = y * a.dilation[1] + group[1];
    return (tz * a.length[1] + ty) * a.length[2] + x * a.dilation[2] + group[2];
  }
};

}  // namespace natrain
