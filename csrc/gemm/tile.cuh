// Who works on what in the gemm kernels, and how tokens come into shared memory.
//
// A warp owns 16 *rows*: adjacent tokens of one head and dilation group, a box of row_tile() extents. The tokens of the
// other side that any of them reaches, the *columns*, lie in a box too. A product of 16 rows with COLUMNS of the box's columns
// at a time holds every (query, key) pair of those rows and some that are none; pairs are told apart where weights are read or
// written. Rows are queries in qk and av, keys in inverse (BY_KEY). The warps of a block stand next to each other, and the
// union of their boxes, the *halo*, is fetched into shared memory once.
//
// A halo that is too large goes through shared memory in *chunks*, runs of CHUNK columns in row-major order: whole lines, or
// parts of the only line. The next chunk is fetched while one is worked on. A wide head is cut into *slices* of HEAD_DIM
// components: av and inverse give each to a block of its own, qk takes them one after another.
//
// Macros (natrain/ops/gemm_plan.py) besides problem_constants.cuh: NATRAIN_RANK, NATRAIN_DTYPE, NATRAIN_HEAD_DIM (of the whole
// head), NATRAIN_PITCH (elements from one row of weights to the next), NATRAIN_OFFSET (int where every offset inside an image fits, else long long),
// NATRAIN_BY_KEY, NATRAIN_ROW_Z.., NATRAIN_WARPS_Z.., NATRAIN_HALO_Z.. (of which every line of
// every box has a multiple of COLUMNS columns), NATRAIN_CHUNK, NATRAIN_BOX_Z.. (the largest of a warp), NATRAIN_SLICES,
// NATRAIN_COLUMNS (8 in qk; in sums 16, or 8 where float32 does with fewer).
#pragma once

#include "intrinsics.cuh"
#include "numeric.cuh"
#include "problem_constants.cuh"

namespace natrain {

using Element = NATRAIN_DTYPE;
using Offset = NATRAIN_OFFSET;

NATRAIN_PER_AXIS(int, row_tile, ROW)
NATRAIN_PER_AXIS(int, warps, WARPS)
NATRAIN_PER_AXIS(int, halo, HALO)

constexpr int SLICES = NATRAIN_SLICES, HEAD_DIM = NATRAIN_HEAD_DIM / SLICES, PITCH = NATRAIN_PITCH;
static_assert(HEAD_DIM * SLICES == NATRAIN_HEAD_DIM);
constexpr bool BY_KEY = NATRAIN_BY_KEY;
// Axes that a problem of lower rank lacks cost nothing.
__device__ constexpr bool has_axis(int axis) { return axis >= 3 - NATRAIN_RANK; }
constexpr int NEIGHBORS = kernel_size(0) * kernel_size(1) * kernel_size(2);
constexpr int ROWS = 16, COLUMNS = NATRAIN_COLUMNS;  // of one product
constexpr int WARPS = warps(0) * warps(1) * warps(2), THREADS = 32 * WARPS;
constexpr int HALO = halo(0) * halo(1) * halo(2);
constexpr int CHUNK = NATRAIN_CHUNK, CHUNKS = (HALO + CHUNK - 1) / CHUNK, STAGES = CHUNKS > 1 ? 2 : 1;
constexpr bool HAS_LINES = halo(0) * halo(1) > 1;
static_assert(CHUNKS == 1 || CHUNK % (HAS_LINES ? halo(2) : COLUMNS) == 0);
static_assert(row_tile(0) * row_tile(1) * row_tile(2) == ROWS);

// Elements of a 16-byte piece; pieces of a row of D, of a row of D with the zeros that fill its last product's depth of two
// pieces, and of a row of weights.
constexpr int PIECE = 16 / sizeof(Element);
constexpr int PIECES = HEAD_DIM / PIECE, DEPTHS = (PIECES + 1) / 2, WEIGHT_PIECES = PITCH / PIECE;
static_assert(HEAD_DIM % PIECE == 0 && PITCH % PIECE == 0);

struct Geometry {
  int length[3];  // tokens
  int dilation[3];
  int tiles[3];   // blocks that cover the longest dilation group
  int heads, batch;
};

__device__ __forceinline__ int first_column(int axis, int row, int n) {
  return BY_KEY ? inverse_first(row, n, kernel_size(axis), window_stride(axis), is_causal(axis))
                : window_start(row, n, kernel_size(axis), window_stride(axis), is_causal(axis));
}
__device__ __forceinline__ int last_column(int axis, int row, int n) {
  return BY_KEY ? inverse_last(row, n, kernel_size(axis), window_stride(axis), is_causal(axis))
                : window_end(row, n, kernel_size(axis), window_stride(axis), is_causal(axis)) - 1;
}

// Positions are those of one dilation group.
struct Tile {
  int lane, warp, batch, head, slice;
  int group[3], length[3];       // dilation group, tokens in it
  int warp_first[3];             // first row
  int halo_first[3];             // first column of the block
  int box_first[3], box_end[3];  // columns of the warp, counted from halo_first
  bool is_active;                // the warp has a row

  // `slices`: of a head, that blocks of their own take.
  __device__ __forceinline__ Tile(const Geometry& g, int slices) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    int index = warp;
    unsigned block = blockIdx.x;
    is_active = true;
    // Slices of a head lie next to each other in memory, then heads, then dilation groups.
    slice = block % slices;
    block /= slices;
    head = block % g.heads;
    block /= g.heads;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      if (!has_axis(axis)) {
        group[axis] = warp_first[axis] = halo_first[axis] = box_first[axis] = 0;
        length[axis] = box_end[axis] = 1;
        continue;
      }
      group[axis] = block % g.dilation[axis];
      block /= g.dilation[axis];
      const unsigned tile = block % g.tiles[axis];
      block /= g.tiles[axis];
      length[axis] = group_length(g.length[axis], g.dilation[axis], group[axis]);
      const int n = length[axis];
      // A shorter group than the longest may have no row here: then the block repeats the last one and stores nothing.
      const int block_first = tile * warps(axis) * row_tile(axis);
      warp_first[axis] = block_first + index % warps(axis) * row_tile(axis);
      index /= warps(axis);
      is_active = is_active && warp_first[axis] < n;
      halo_first[axis] = first_column(axis, min(block_first, n - 1), n);
      box_first[axis] = first_column(axis, min(warp_first[axis], n - 1), n) - halo_first[axis];
      box_end[axis] = last_column(axis, min(warp_first[axis] + row_tile(axis), n) - 1, n) + 1 - halo_first[axis];
    }
    batch = block;
  }

  // Position of the warp's row r along an axis; it may lie past the end of the group.
  __device__ __forceinline__ int row(int axis, int r) const {
    if (!has_axis(axis)) return 0;
    return warp_first[axis] + (axis == 2   ? r % row_tile(2)
                               : axis == 1 ? r / row_tile(2) % row_tile(1)
                                           : r / (row_tile(2) * row_tile(1)));
  }
  __device__ __forceinline__ bool has_row(int r) const {
    return row(0, r) < length[0] && row(1, r) < length[1] && row(2, r) < length[2];
  }

  // Element (batch, the first token of the dilation group, head, 0).
  template <class T>
  __device__ __forceinline__ T* origin(T* data, const Layout& at) const {
    return data + (batch * at.batch + head * at.head) +
           (Offset(at.token[0]) * group[0] + Offset(at.token[1]) * group[1] + Offset(at.token[2]) * group[2]);
  }
};

// From one position of a dilation group to the next, in elements.
struct Step {
  Offset z, y, x;

  __device__ __forceinline__ Step(const Geometry& g, const Layout& at)
      : z(Offset(at.token[0]) * g.dilation[0]),
        y(Offset(at.token[1]) * g.dilation[1]),
        x(Offset(at.token[2]) * g.dilation[2]) {}

  __device__ __forceinline__ Offset to(int at_z, int at_y, int at_x) const { return z * at_z + y * at_y + x * at_x; }

  // Of row r of the warp, or of the last token of the group where it lies past it.
  __device__ __forceinline__ Offset to_row(const Tile& tile, int r) const {
    return to(min(tile.row(0, r), tile.length[0] - 1), min(tile.row(1, r), tile.length[1] - 1),
              min(tile.row(2, r), tile.length[2] - 1));
  }
};

// Begins to fetch a chunk's rows of `x` [B, *S, N, W], in PIECES 16-byte pieces, into rows of `pitch` bytes; zeros where
// there is no token, and in the pieces from PIECES on to FILLED. A warp takes whole lines, so that a lane's column and piece
// are the same in each; of a single line it takes a part.
template <int PIECES, int FILLED>
__device__ __forceinline__ void fetch_chunk(const Tile& tile, const Geometry& g, const Element* x, const Layout& at,
                                            int chunk, unsigned shared, int pitch) {
  constexpr int WIDTH = HAS_LINES ? halo(2) : CHUNK, LINES = CHUNK / WIDTH, ROUNDS = (WIDTH * FILLED + 31) / 32;
  const Element* const origin = tile.origin(x, at);
  const Step step(g, at);
#pragma unroll(HAS_LINES && ROUNDS <= 8 ? ROUNDS : 1)
  for (int round = HAS_LINES ? 0 : tile.warp; round < ROUNDS; round += HAS_LINES ? 1 : WARPS) {
    const int index = round * 32 + tile.lane, column = index / FILLED, piece = index % FILLED;
    if (WIDTH * FILLED % 32 != 0 && column >= WIDTH) continue;
    const int px = tile.halo_first[2] + (HAS_LINES ? 0 : chunk * CHUNK) + column;
    const bool is_filled = px < tile.length[2] && (PIECES == FILLED || piece < PIECES);
    const Element* const source = origin + (step.x * px + piece * PIECE);
    const unsigned target = shared + column * pitch + piece * 16;
    for (int line = HAS_LINES ? tile.warp : 0; line < LINES; line += HAS_LINES ? WARPS : 1) {
      const int pz = tile.halo_first[0] + (chunk * LINES + line) / halo(1);
      const int py = tile.halo_first[1] + (chunk * LINES + line) % halo(1);
      const bool is_valid = is_filled && (!HAS_LINES || (py < tile.length[1] && pz < tile.length[0]));
      const Offset to_line = HAS_LINES ? step.z * pz + step.y * py : Offset(0);
      cp_async_16(target + line * WIDTH * pitch, is_valid ? source + to_line : origin, is_valid);
    }
  }
}

// Columns along x of the warp's box that lie in a chunk; parts of a line begin at multiples of COLUMNS.
__device__ __forceinline__ int first_x(const Tile& tile, int chunk) {
  if (CHUNKS == 1 || HAS_LINES) return tile.box_first[2];
  return max(tile.box_first[2] / COLUMNS * COLUMNS, chunk * CHUNK);
}
__device__ __forceinline__ int end_x(const Tile& tile, int chunk) {
  return CHUNKS == 1 || HAS_LINES ? tile.box_end[2] : min(tile.box_end[2], chunk * CHUNK + CHUNK);
}

// Visits (z, y) of every line of the warp's box in a chunk, with the row of shared memory in which its column x lies.
template <class Visit>
__device__ __forceinline__ void for_each_line(const Tile& tile, int chunk, int x, Visit visit) {
  const int line = chunk * CHUNK / halo(2), end = line + CHUNK / halo(2);
  const bool is_cut = CHUNKS > 1 && HAS_LINES;
  const int z_first = is_cut ? max(tile.box_first[0], line / halo(1)) : tile.box_first[0];
  const int z_end = is_cut ? min(tile.box_end[0], (end - 1) / halo(1) + 1) : tile.box_end[0];
  for (int z = z_first; z < z_end; ++z) {
    const int y_first = is_cut ? max(tile.box_first[1], line - z * halo(1)) : tile.box_first[1];
    const int y_end = is_cut ? min(tile.box_end[1], end - z * halo(1)) : tile.box_end[1];
#pragma unroll 2
    for (int y = y_first; y < y_end; ++y) visit(z, y, (z * halo(1) + y) * halo(2) + x - chunk * CHUNK);
  }
}

// Runs `work(chunk, row of its first column)` on every chunk of `x`, the next one under way.
template <int PIECES, int FILLED, class Work>
__device__ __forceinline__ void for_each_chunk(const Tile& tile, const Geometry& g, const Element* x, const Layout& at,
                                               unsigned shared, int pitch, Work work) {
  fetch_chunk<PIECES, FILLED>(tile, g, x, at, 0, shared, pitch);
  cp_async_commit();
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    cp_async_wait<0>();
    // Also: all warps are done with the chunk before, whose place the next one takes.
    __syncthreads();
    if (chunk + 1 < CHUNKS) {
      fetch_chunk<PIECES, FILLED>(tile, g, x, at, chunk + 1, shared + (chunk + 1) % STAGES * CHUNK * pitch, pitch);
      cp_async_commit();
    }
    if (tile.is_active) work(chunk, chunk % STAGES * CHUNK);
  }
}

// The warp's own rows of [B, *S, N, W]; all of its lanes call together.
struct OwnRows {
  Offset offset;   // of row lane % 16 (the group's last token where it lies past the end), from the group's first token
  unsigned there;  // bit r: row r is not past the end
  int lane;

  __device__ __forceinline__ OwnRows(const Tile& tile, const Geometry& g, const Layout& at)
      : offset(Step(g, at).to_row(tile, tile.lane % ROWS)),
        there(__ballot_sync(WARP, tile.has_row(tile.lane % ROWS))),
        lane(tile.lane) {}

  // Visits every piece (offset of the row, row, piece, whether the row is there).
  template <int PIECES, class Visit>
  __device__ __forceinline__ void for_each_piece(Visit visit) const {
#pragma unroll(PIECES <= 16 ? (ROWS * PIECES + 31) / 32 : 1)
    for (int first = 0; first < ROWS * PIECES; first += 32) {
      const int r = min((first + lane) / PIECES, ROWS - 1), piece = (first + lane) % PIECES;
      const Offset row = __shfl_sync(WARP, offset, r);
      if (ROWS * PIECES % 32 == 0 || first + lane < ROWS * PIECES) visit(row, r, piece, there >> r & 1);
    }
  }
};

// Begins to fetch the warp's rows, as fetch_chunk does; past the group's end the last token again.
template <int PIECES, int FILLED>
__device__ __forceinline__ void fetch_own(const Tile& tile, const Geometry& g, const Element* x, const Layout& at,
                                          unsigned shared, int pitch) {
  const Element* const origin = tile.origin(x, at);
  OwnRows(tile, g, at).for_each_piece<FILLED>([&](Offset row, int r, int piece, bool) {
    const bool is_valid = PIECES == FILLED || piece < PIECES;
    cp_async_16(shared + r * pitch + piece * 16, origin + row + (is_valid ? piece * PIECE : 0), is_valid);
  });
}

// Writes the warp's rows of PIECES pieces from shared memory to `out`.
template <int PIECES>
__device__ __forceinline__ void store_own(const Tile& tile, const Geometry& g, const unsigned char* shared, int pitch,
                                          Element* out, const Layout& at) {
  Element* const origin = tile.origin(out, at);
  OwnRows(tile, g, at).for_each_piece<PIECES>([&](Offset row, int r, int piece, bool is_there) {
    if (is_there)
      *reinterpret_cast<uint4*>(origin + row + piece * PIECE) =
          *reinterpret_cast<const uint4*>(shared + r * pitch + piece * 16);
  });
}

}  // namespace natrain

// Where shared memory lets few blocks share a multiprocessor anyway, each may have the registers that leaves it.
#if NATRAIN_MIN_BLOCKS
#define NATRAIN_GEMM_BOUNDS __launch_bounds__(natrain::THREADS, NATRAIN_MIN_BLOCKS)
#else
#define NATRAIN_GEMM_BOUNDS __launch_bounds__(natrain::THREADS)
#endif
