// Who works on what in the tensor-core kernels, and which columns a row meets.
//
// *Rows* are the 16 tokens of a warp's row tile (forward, dQ: queries; dK/dV: keys; all gradients in one pass: both),
// *columns* the tokens of the other side. All positions are those of one dilation group. A *box* is a tile's columns: a
// box of positions that holds every column of any of its rows; a *line* is one (z, y) row of it. A block's warps are a box
// of row tiles next to each other; the union of their boxes, the *halo*, is fetched into shared memory, in chunks where it
// is large.
//
// Baked in (natrain/ops/fused_plan.py chooses, problem_constants.cuh holds the window), _Z _Y _X each:
//   NATRAIN_ROW_TILE   extents of a row tile, product 16
//   NATRAIN_WARPS      row tiles of a block
//   NATRAIN_BOX        extents of a box, at least the reach of any tile; X is 8 (then Y is even) or a multiple of 16
//   NATRAIN_CHUNK      extents of what one stage of shared memory holds; the whole halo if NATRAIN_RESIDENT
//   NATRAIN_STEP       extents of what a warp computes at once: the box if NATRAIN_RESIDENT
//   NATRAIN_WALK       the axis along which a block walks from a tile to others that are like it; 3: none
//   NATRAIN_WALK_OVER  what lies along it: 0 tiles, 1 dilation groups
// and NATRAIN_DTYPE, NATRAIN_HEAD_DIM, NATRAIN_VALUE_DIM, NATRAIN_OFFSET (int where every offset inside an image fits, else
// long long), NATRAIN_ROWS (a Side).
#pragma once

#include "intrinsics.cuh"
#include "problem_constants.cuh"

namespace natrain {

using Element = NATRAIN_DTYPE;
using Offset = NATRAIN_OFFSET;

constexpr int HEAD_DIM = NATRAIN_HEAD_DIM;
constexpr int VALUE_DIM = NATRAIN_VALUE_DIM;
constexpr bool RESIDENT = NATRAIN_RESIDENT;

// What rows are. BOTH: first queries, then keys; a box holds the columns of either, and the rows themselves.
enum class Side { QUERIES, KEYS, BOTH };
constexpr Side ROWS = Side(NATRAIN_ROWS);
constexpr bool ROWS_ARE_KEYS = ROWS == Side::KEYS;

NATRAIN_PER_AXIS(int, row_tile, ROW_TILE)
NATRAIN_PER_AXIS(int, warps, WARPS)
NATRAIN_PER_AXIS(int, box, BOX)
NATRAIN_PER_AXIS(int, chunk, CHUNK)
NATRAIN_PER_AXIS(int, step, STEP)

constexpr int WARPS = warps(0) * warps(1) * warps(2);
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK_TOKENS = chunk(0) * chunk(1) * chunk(2);
// Columns are taken by 16, the k of an mma: two n8 blocks, of one line or of two.
constexpr int GROUPS = step(0) * step(1) * step(2) / 16;
constexpr bool PAIRS_OF_LINES = step(2) == 8;
static_assert(row_tile(0) * row_tile(1) * row_tile(2) == 16);
static_assert(PAIRS_OF_LINES ? step(1) % 2 == 0 : step(2) % 16 == 0);
// A chunk narrower than the halo along x: groups are then aligned in the halo, else to the box.
constexpr bool CHUNKED_X = NATRAIN_CHUNKED_X;
static_assert(!CHUNKED_X || step(2) == chunk(2));

// Tiles whose rows stand alike in their windows, none at a border, share all that is relative to their halo: start values,
// offsets, masks. So do equal tiles of dilation groups of one length. A block that walks over a *stretch* of them finds
// these once, which spares time where images are few.
constexpr int WALK = NATRAIN_WALK;
constexpr bool WALKS = WALK < 3, WALKS_GROUPS = WALKS && NATRAIN_WALK_OVER;

struct Geometry {
  int length[3];    // tokens
  int dilation[3];
  int tiles[3];     // blocks that cover the longest dilation group: one a tile, along WALK one a run or a tile
  int heads;
  int heads_per_kv; // heads of q that share one of k and v
  int batch;
  int splits;       // blocks that share the images of one tile
  // Along WALK: of every dilation group the tiles of the stretch, and how many blocks share them. Of groups: the longer
  // ones and how many blocks share them; `stretch_first` share the others.
  int stretch_first, stretch_count, stretch_runs;
};

// Of a row that is a query, a key, or one and then the other.
__device__ __forceinline__ int first_column(int axis, int row, int n, Side side = ROWS) {
  const int of_query = window_start(row, n, kernel_size(axis), window_stride(axis), is_causal(axis));
  const int of_key = inverse_first(row, n, kernel_size(axis), window_stride(axis), is_causal(axis));
  return side == Side::QUERIES ? of_query : side == Side::KEYS ? of_key : min(row, min(of_query, of_key));
}
// One past the last.
__device__ __forceinline__ int end_column(int axis, int row, int n, Side side = ROWS) {
  const int of_query = window_end(row, n, kernel_size(axis), window_stride(axis), is_causal(axis));
  const int of_key = inverse_last(row, n, kernel_size(axis), window_stride(axis), is_causal(axis)) + 1;
  return side == Side::QUERIES ? of_query : side == Side::KEYS ? of_key : max(row + 1, max(of_query, of_key));
}

// Of row r (0 .. 15) of a row tile.
__device__ constexpr int row_coordinate(int axis, int r) {
  return axis == 2 ? r % row_tile(2) : axis == 1 ? r / row_tile(2) % row_tile(1) : r / (row_tile(2) * row_tile(1));
}

// Of a block.
__device__ constexpr int block_rows(int axis) { return row_tile(axis) * warps(axis); }

// What a block and this thread's warp work on; the block stays at it for the images first_image, + splits, ...: at this
// tile, and at the next `run - 1` along WALK. Positions are those of the first one.
struct Tile {
  int head, first_image, run;
  int group[3], length[3];        // dilation group, and its number of positions n
  int block_first[3];             // first row of the block
  int row_first[3];               // first row of the warp
  int halo_first[3], halo_end[3]; // columns of the block
  int box_first[3], box_end[3];   // columns of the warp, in positions from halo_first
  bool is_active;                 // false: the warp has no row, its row_first is that of another tile

  __device__ __forceinline__ explicit Tile(const Geometry& g) {
    unsigned block = blockIdx.x, warp = threadIdx.x / 32;
    is_active = true, run = 1;
    // The index along WALK comes last, so that longer runs start before single tiles.
    const unsigned of_walk = WALKS ? block / blocks_beside(g) : 0;
    if (WALKS) block %= blocks_beside(g);
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const unsigned at = axis == WALK ? of_walk : block % blocks_along(g, axis);
      block /= axis == WALK ? 1 : blocks_along(g, axis);
      const unsigned groups = groups_along(g, axis);
      group[axis] = axis == WALK && WALKS_GROUPS ? find_groups(g, at % groups) : at % groups;
      length[axis] = group_length(g.length[axis], g.dilation[axis], group[axis]);
      const int rows = block_rows(axis), last = length[axis] - 1;
      const int tile = axis == WALK && !WALKS_GROUPS ? find_tiles(g, at / groups) : int(at / groups);
      // A shorter group may lack the last tile.
      block_first[axis] = min(tile * rows, last);
      const bool is_past = tile * rows > last;
      row_first[axis] = block_first[axis] + int(warp % warps(axis)) * row_tile(axis);
      warp /= warps(axis);
      is_active = is_active && !is_past && row_first[axis] <= last;
      row_first[axis] = min(row_first[axis], last);
      halo_first[axis] = first_column(axis, block_first[axis], length[axis]);
      halo_end[axis] = end_column(axis, min(block_first[axis] + rows - 1, last), length[axis]);
      box_first[axis] = first_column(axis, row_first[axis], length[axis]) - halo_first[axis];
      box_end[axis] = end_column(axis, min(row_first[axis] + row_tile(axis) - 1, last), length[axis]) - halo_first[axis];
    }
    head = block % g.heads;
    first_image = block / g.heads;
  }

  // Dilation groups, or runs of them.
  static __device__ __forceinline__ unsigned groups_along(const Geometry& g, int axis) {
    return axis == WALK && WALKS_GROUPS ? g.stretch_runs + g.stretch_first : g.dilation[axis];
  }
  static __device__ __forceinline__ unsigned blocks_along(const Geometry& g, int axis) {
    return g.tiles[axis] * groups_along(g, axis);
  }
  // Blocks that are at the same place along WALK.
  static __device__ __forceinline__ unsigned blocks_beside(const Geometry& g) {
    return gridDim.x / (WALKS ? blocks_along(g, WALK % 3) : 1);
  }
  // Of this block among the `count` of its head.
  __device__ __forceinline__ unsigned number(const Geometry& g, unsigned count) const {
    const unsigned tiles = count / g.splits;
    if (!WALKS) return first_image * tiles + blockIdx.x % tiles;
    const unsigned beside = blocks_beside(g), along = gridDim.x / beside;
    return (first_image * (tiles / along) + blockIdx.x % beside % (tiles / along)) * along + blockIdx.x / beside;
  }

  // Where what is fetched must end: at the group's end; where the tile is not the last one of a run, and along x, at the
  // end of what any row of the block has.
  __device__ __forceinline__ int fetch_end(int axis) const {
    return axis == 2 || axis == WALK ? halo_end[axis] : length[axis];
  }

  // Position of row r of the warp's tile; past the end of the group it repeats the last one.
  __device__ __forceinline__ int row(int axis, int r) const {
    return min(row_first[axis] + row_coordinate(axis, r), length[axis] - 1);
  }
  __device__ __forceinline__ bool has_row(int r) const {
    bool has = is_active;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) has = has && row_first[axis] + row_coordinate(axis, r) < length[axis];
    return has;
  }
  // Token of row r in its image, row-major.
  __device__ __forceinline__ int row_token(const Geometry& g, int r) const {
    int token = 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) token = token * g.length[axis] + row(axis, r) * g.dilation[axis] + group[axis];
    return token;
  }

  // Elements from (image, head) to the first token of the dilation group; heads of k and v are shared.
  __device__ __forceinline__ long long group_origin(const Layout& at, int of_head) const {
    return of_head * at.head + group[0] * at.token[0] + group[1] * at.token[1] + group[2] * at.token[2];
  }

 private:
  // The first tile of the block that is `at` along WALK, whose run is found with it: first runs, then tiles outside of the
  // stretch.
  __device__ __forceinline__ int find_tiles(const Geometry& g, int at) {
    const int single = at - g.stretch_runs;
    if (single >= 0) return single < g.stretch_first ? single : single + g.stretch_count;
    return g.stretch_first + find_run(g.stretch_count, g.stretch_runs, at);
  }
  // The first group of the block, and its run: first longer groups, then the others.
  __device__ __forceinline__ int find_groups(const Geometry& g, int at) {
    if (at < g.stretch_runs) return find_run(g.stretch_count, g.stretch_runs, at);
    return g.stretch_count + find_run(g.dilation[WALK % 3] - g.stretch_count, g.stretch_first, at - g.stretch_runs);
  }
  // Where the `index`-th of `runs` that share `count` begins; the longer ones come first.
  __device__ __forceinline__ int find_run(int count, int runs, int index) {
    const int least = count / runs, longer = count % runs;
    run = least + (index < longer);
    return index * least + min(index, longer);
  }
};

// Where a block is: at an image, and at a tile of its run.
struct Visit {
  int image, walked;

  __device__ __forceinline__ explicit Visit(const Tile& tile) : image(tile.first_image), walked(0) {}

  __device__ __forceinline__ void advance(const Tile& tile, const Geometry& g) {
    if (WALKS && ++walked < tile.run) return;
    walked = 0;
    image += g.splits;
  }
};

// From a visit to the next one, in elements of a tensor (or in tokens).
struct Leap {
  long long to_tile, to_image;

  // `image_step`: to the block's next image.
  __device__ __forceinline__ Leap(const Tile& tile, long long tile_step, long long image_step)
      : to_tile(tile_step), to_image(image_step - (WALKS ? (tile.run - 1) * tile_step : 0)) {}
  __device__ __forceinline__ Leap(const Tile& tile, const Geometry& g, const Layout& at)
      : Leap(tile, walk_step(g, at), g.splits * at.batch) {}

  static __device__ __forceinline__ long long walk_step(const Geometry& g, const Layout& at) {
    return WALKS ? at.token[WALK % 3] * walk_positions(g) : 0;
  }
  static __device__ __forceinline__ int walk_tokens(const Geometry& g) {
    int tokens = WALKS ? walk_positions(g) : 0;
#pragma unroll
    for (int axis = WALK + 1; axis < 3; ++axis) tokens *= g.length[axis];
    return tokens;
  }

  // From one tile of a run to the next, along WALK.
  static __device__ __forceinline__ int walk_positions(const Geometry& g) {
    return WALKS_GROUPS ? 1 : block_rows(WALK % 3) * g.dilation[WALK % 3];
  }

  __device__ __forceinline__ long long to(const Visit& next) const {
    return WALKS && next.walked ? to_tile : to_image;
  }
  // From `visit` back to an earlier one.
  __device__ __forceinline__ long long back(const Visit& visit, const Visit& earlier, const Tile& tile, int splits) const {
    const long long images = (visit.image - earlier.image) / splits;
    return images * (to_image + (WALKS ? (tile.run - 1) * to_tile : 0)) + (visit.walked - earlier.walked) * to_tile;
  }
};

// From one position of a dilation group to the next, in elements.
struct Step {
  Offset to[3];

  __device__ __forceinline__ Step(const Geometry& g, const Layout& at)
      : to{Offset(at.token[0]) * g.dilation[0], Offset(at.token[1]) * g.dilation[1], Offset(at.token[2]) * g.dilation[2]} {}
};

// Elements from the first token of the dilation group to row `r`.
__device__ __forceinline__ Offset row_offset(const Tile& tile, const Step& step, int r) {
  return tile.row(0, r) * step.to[0] + tile.row(1, r) * step.to[1] + tile.row(2, r) * step.to[2];
}

}  // namespace natrain
