// The values that scores start from: the bias where a (row, column) pair is one of the window, -inf where it is not.
//
// They are the accumulators that the products of rows and columns are added to, so that a mask and a bias cost no
// instruction of their own. Scores are q . k + bias / scale: the scale comes in with the exponent, in one fma.
//
// NATRAIN_START_TABLE 2, for small windows in one plane: a table in shared memory, built once a block, that holds for every
// *class* of rows its lines one below the other, with lines of -inf between them. A row's class along y is where it stands
// in its window (interior rows are all alike); a lane has one pointer, and the lines of its box follow at constant
// distances whether they are in its window or not. Along x a class is that of a whole warp tile.
// NATRAIN_START_TABLE 1: the table has a line for every difference of positions along z and y, an entry for every row's x
// in the block and every column, and one more line of -inf, to which a lane points where a line is not its row's.
// NATRAIN_START_TABLE 0, for windows whose table is too large, and for rows of both sides: comparisons in groups of columns
// that lie on a window's edge, none inside, and the bias as it is, from shared memory if it is small
// (NATRAIN_MOST_STAGED_BIAS bytes).
#pragma once

#include "products.cuh"

#include "dropout.h"

namespace natrain {

constexpr float MINUS_INFINITY = __builtin_bit_cast(float, 0xff800000u);
constexpr bool HAS_RPB = NATRAIN_HAS_RPB;
constexpr bool START_TABLE = NATRAIN_START_TABLE;
static_assert(ROWS != Side::BOTH || !(HAS_RPB || START_TABLE));

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// score = scale * (q . k) + bias, as the kernels use it: log2(e) * score = exponent * (q' . k + bias * per_scale), where
// q' is q, or -q for a negative scale. A scale of zero counts as 1e-20, so that bias / scale stays finite.
struct Scale {
  float exponent, per_scale;
  unsigned flip;  // of the words of q

  __device__ __forceinline__ explicit Scale(float scale) {
    const float magnitude = fmaxf(fabsf(scale), 1e-20f);
    exponent = magnitude * LOG2_E;
    per_scale = 1 / magnitude;
    flip = scale >= 0 ? 0 : sizeof(Element) == 2 ? 0x80008000u : 0x80000000u;
  }
};

// Lines of a step, as bits.
constexpr int STEP_LINES = step(0) * step(1);
static_assert(STEP_LINES <= 32);

__device__ constexpr int group_line(int u, int second) {
  return PAIRS_OF_LINES ? 2 * u + second : u / (step(2) / 16);
}
__device__ constexpr int group_x(int u, int second) {
  return PAIRS_OF_LINES ? 0 : u % (step(2) / 16) * 16 + second * 8;
}

// Lines of a step whose first is `z`, `y` that lie in [z_from, z_to) x [y_from, y_to).
__device__ __forceinline__ unsigned lines_within(int z, int y, int z_from, int z_to, int y_from, int y_to) {
  const int from = min(max(y_from - y, 0), step(1)), to = min(max(y_to - y, from), step(1));
  const unsigned of_plane = (to < 32 ? (1u << to) - 1 : ~0u) & ~(from < 32 ? (1u << from) - 1 : ~0u);
  unsigned lines = 0;
#pragma unroll
  for (int plane = 0; plane < step(0); ++plane)
    lines |= z + plane >= z_from && z + plane < z_to ? of_plane << (plane * step(1)) : 0;
  return lines;
}

// A block has one row along this axis, and that row one column.
__device__ constexpr bool is_flat(int axis) { return kernel_size(axis) == 1 && row_tile(axis) * warps(axis) == 1; }

// The columns of rows g and g + 8 of this thread, in positions of the halo; `side`: what these rows are.
struct LaneRows {
  int row[2][3], first[2][3], end[2][3];

  __device__ __forceinline__ explicit LaneRows(const Tile& tile, Side side = ROWS) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        if (is_flat(axis)) {
          row[half][axis] = first[half][axis] = 0, end[half][axis] = 1;
          continue;
        }
        const int at = tile.row(axis, int(threadIdx.x % 32 / 4) + 8 * half);
        row[half][axis] = at - tile.halo_first[axis];
        first[half][axis] = first_column(axis, at, tile.length[axis], side) - tile.halo_first[axis];
        end[half][axis] = end_column(axis, at, tile.length[axis], side) - tile.halo_first[axis];
      }
  }
};

constexpr int BIAS_Y = 2 * kernel_size(1) - 1, BIAS_X = 2 * kernel_size(2) - 1;
constexpr int BIAS_LINES = (2 * kernel_size(0) - 1) * BIAS_Y;
// Index into an axis of the bias, (key - query) + k - 1, of two positions.
__device__ __forceinline__ int bias_index(int axis, int row, int column) {
  return (ROWS_ARE_KEYS ? row - column : column - row) + kernel_size(axis) - 1;
}
// How the bias moves as the column does.
constexpr int BIAS_SIGN = ROWS_ARE_KEYS ? -1 : 1;
constexpr int BIAS_BYTES = BIAS_LINES * BIAS_X * 4;

__device__ __forceinline__ const float* bias_of_head(const float* rpb, const Tile& tile) {
  return HAS_RPB ? rpb + (long long)tile.head * BIAS_LINES * BIAS_X : nullptr;
}

// The head's bias as start values have it, read once into `scratch` (BIAS_BYTES of shared memory), visible after the next
// barrier: building a table from global memory would wait for it entry by entry.
__device__ __forceinline__ void stage_bias(float* scratch, const Tile& tile, const float* rpb, float per_scale) {
  const float* const of_head = bias_of_head(rpb, tile);
#pragma unroll 4
  for (int i = threadIdx.x; i < BIAS_LINES * BIAS_X; i += THREADS) scratch[i] = __ldg(of_head + i) * per_scale;
}

#if NATRAIN_START_TABLE == 2

// Baked in: NATRAIN_CLASSES_Y and _X, the most classes of a block; NATRAIN_CLASS_LINES, the most lines of a row;
// NATRAIN_CLASS_MARGIN, lines of -inf before, between and after classes: a box begins at most so many lines before its
// rows' first lines, and ends at most so many after a class's last.
struct StartTable {
  static constexpr int CLASSES_Y = NATRAIN_CLASSES_Y, CLASSES_X = NATRAIN_CLASSES_X;
  static constexpr int MARGIN = NATRAIN_CLASS_MARGIN, SPACING = NATRAIN_CLASS_LINES + MARGIN;
  static constexpr int LINES = CLASSES_Y * SPACING + MARGIN;
  static constexpr int ROWS_Y = row_tile(1) * warps(1);
  static constexpr int BLOCK_BYTES = CLASSES_X * row_tile(2) * 32;  // [class][row x of a tile][8 columns] float32
  // Half a warp's rows in different lines must fall into different banks.
  static constexpr int SPREAD = row_tile(2) < 4 ? row_tile(2) * 32 : 0;
  static constexpr int RAW = box(2) / 8 * BLOCK_BYTES;
  static constexpr int LINE_BYTES = SPREAD == 0 ? RAW : RAW + (SPREAD + 128 - RAW % 128) % 128;
  // Behind the lines: the class of every row along y and of every warp along x; of every class along y how many lines it
  // has and which line of the bias is its first; of every class along x its first warp.
  static constexpr int CLASS_OF_Y = 0, CLASS_OF_X = ROWS_Y, COUNT_OF = CLASS_OF_X + warps(2),
                       BIAS_OF = COUNT_OF + CLASSES_Y, WARP_OF = BIAS_OF + CLASSES_Y, ENTRIES = WARP_OF + CLASSES_X;
  static constexpr int BYTES = LINES * LINE_BYTES + (ENTRIES * 4 + 15) / 16 * 16;
  static_assert(RESIDENT && box(0) == 1 && kernel_size(0) == 1 && ROWS_Y <= 32);

  static __device__ __forceinline__ int* classes(unsigned char* table) {
    return reinterpret_cast<int*>(table + LINES * LINE_BYTES);
  }

  // By one warp. Lane i looks at row i along y and at warp i along x; a class begins where one differs from the one before.
  static __device__ __forceinline__ void find_classes(int* of, const Tile& tile) {
    const int lane = threadIdx.x % 32, n_y = tile.length[1], n_x = tile.length[2];
    // What this block lacks has no line.
    for (int i = lane; i < CLASSES_Y; i += 32) of[COUNT_OF + i] = of[BIAS_OF + i] = 0;
    for (int i = lane; i < CLASSES_X; i += 32) of[WARP_OF + i] = 0;
    __syncwarp();
    const int row = min(tile.block_first[1] + lane, n_y - 1);
    const int first = first_column(1, row, n_y), count = end_column(1, row, n_y) - first;
    const int kind = HAS_RPB ? (row - first) << 16 ^ count : count;
    bool begins = __shfl_up_sync(WARP, kind, 1) != kind || lane == 0;
    unsigned begin = __ballot_sync(WARP, begins && lane < ROWS_Y);
    if (lane < ROWS_Y) {
      const int number = __popc(begin << (31 - lane)) - 1;
      of[CLASS_OF_Y + lane] = number;
      if (begins) of[COUNT_OF + number] = count, of[BIAS_OF + number] = bias_index(1, row, first);
    }
    begins = lane == 0;
    const int warp_first = min(tile.block_first[2] + lane * row_tile(2), n_x - 1), from = first_column(2, warp_first, n_x);
#pragma unroll 1
    for (int x = 0; x < row_tile(2); ++x) {
      const int at = min(tile.block_first[2] + lane * row_tile(2) + x, n_x - 1);
      const int window = (first_column(2, at, n_x) - from) << 16 ^ (end_column(2, at, n_x) - from);
      const int offset = HAS_RPB ? at - from : 0;
      begins = (__shfl_up_sync(WARP, window, 1) != window) | (__shfl_up_sync(WARP, offset, 1) != offset) | begins;
    }
    begin = __ballot_sync(WARP, begins && lane < warps(2));
    if (lane < warps(2)) {
      const int number = __popc(begin << (31 - lane)) - 1;
      of[CLASS_OF_X + lane] = number;
      if (begins) of[WARP_OF + number] = lane;
    }
  }

  // By all threads of the block; visible after the next barrier. `bias`: of this head, in global memory, or with a factor of
  // 1 what stage_bias wrote.
  static __device__ __forceinline__ void fill(unsigned char* table, const Tile& tile, const float* bias, float factor) {
    int* const of = classes(table);
    if (threadIdx.x < 32) find_classes(of, tile);
    __syncthreads();
    constexpr int FLOATS = LINE_BYTES / 4;
    // A thread keeps its entry and walks over lines.
    constexpr int WIDTH = FLOATS < THREADS ? FLOATS : THREADS, AT_ONCE = THREADS / WIDTH;
    if (threadIdx.x >= WIDTH * AT_ONCE) return;
    const int n = tile.length[2];
    for (int entry = threadIdx.x % WIDTH; entry < FLOATS; entry += WIDTH) {
      const int block = entry / (BLOCK_BYTES / 4), row_x = entry / 8 % (CLASSES_X * row_tile(2));
      const int warp_first = tile.block_first[2] + of[WARP_OF + row_x / row_tile(2)] * row_tile(2);
      const int x = min(warp_first + row_x % row_tile(2), n - 1);
      const int column = first_column(2, min(warp_first, n - 1), n) + block * 8 + entry % 8;
      const bool valid =
          block < box(2) / 8 && column >= first_column(2, x, n) && column < end_column(2, x, n);
      const int bias_x = bias_index(2, x, column);
#pragma unroll 4
      for (int line = threadIdx.x / WIDTH; line < LINES; line += AT_ONCE) {
        const int of_class = line - MARGIN, number = of_class >= 0 ? of_class / SPACING : 0;
        const int j = of_class >= 0 ? of_class % SPACING : SPACING;
        float value = MINUS_INFINITY;
        if (valid && j < of[COUNT_OF + number])
          value = HAS_RPB ? bias[(of[BIAS_OF + number] + BIAS_SIGN * j) * BIAS_X + bias_x] * factor : 0.f;
        reinterpret_cast<float*>(table)[line * FLOATS + entry] = value;
      }
    }
  }
};

class Start {
  unsigned entry[2];  // of rows g and g + 8: this lane's entry in line 0 of its class
  unsigned first[2];  // the same in the step's first line

 public:
  __device__ __forceinline__ Start(const Tile&, unsigned table_offset) {
    NATRAIN_DYNAMIC_SHARED(bytes);
    const int* const of = StartTable::classes(bytes + table_offset);
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = threadIdx.x % 32 / 4 + 8 * half;
      const int row_y = warp / warps(2) % warps(1) * row_tile(1) + row_coordinate(1, r);
      const int line = of[StartTable::CLASS_OF_Y + row_y] * StartTable::SPACING + StartTable::MARGIN;
      const int row_x = of[StartTable::CLASS_OF_X + warp % warps(2)] * row_tile(2) + row_coordinate(2, r);
      entry[half] = table_offset + line * StartTable::LINE_BYTES + row_x * 32 + threadIdx.x % 4 * 8;
    }
  }

  // The step whose first line is at `z`, `y` of the halo.
  __device__ __forceinline__ void to_step(const LaneRows& rows, int, int y, int) {
#pragma unroll
    for (int half = 0; half < 2; ++half) first[half] = entry[half] + (y - rows.first[half][1]) * StartTable::LINE_BYTES;
  }

  __device__ static constexpr bool is_empty(int) { return false; }

  // Start values of group u of the step.
  __device__ __forceinline__ void load(const Shared& shared, int u, float (&start)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int second = i / 2, half = i % 2;
      const float2 pair = *reinterpret_cast<const float2*>(
          shared.bytes + first[half] + group_line(u, second) * StartTable::LINE_BYTES +
          group_x(u, second) / 8 * StartTable::BLOCK_BYTES);
      start[second][2 * half] = pair.x;
      start[second][2 * half + 1] = pair.y;
    }
  }
};

#elif NATRAIN_START_TABLE

struct StartTable {
  static constexpr int LINES = HAS_RPB ? BIAS_LINES : 1;
  static constexpr int ROWS_X = row_tile(2) * warps(2);        // x coordinates of a block's rows
  static constexpr int BLOCK_BYTES = ROWS_X * 32;              // [row x][8 columns] float32, of one n8 block
  // Half a warp's rows in different lines must fall into different banks.
  static constexpr int SPREAD = row_tile(2) < 4 ? row_tile(2) * 32 : 0;
  static constexpr int RAW = box(2) / 8 * BLOCK_BYTES;
  static constexpr int LINE_BYTES = SPREAD == 0 ? RAW : RAW + (SPREAD + 128 - RAW % 128) % 128;
  static constexpr int BYTES = (LINES + 1) * LINE_BYTES;

  // By all threads of the block; visible after the next barrier. `bias`: of this head, in global memory, or with a factor of
  // 1 what stage_bias wrote.
  static __device__ __forceinline__ void fill(unsigned char* table, const Tile& tile, const float* bias, float factor) {
    __syncthreads();
    constexpr int FLOATS = LINE_BYTES / 4;
    // A thread keeps its entry and walks over lines.
    constexpr int WIDTH = FLOATS < THREADS ? FLOATS : THREADS, AT_ONCE = THREADS / WIDTH;
    if (threadIdx.x >= WIDTH * AT_ONCE) return;
    const int n = tile.length[2];
    for (int entry = threadIdx.x % WIDTH; entry < FLOATS; entry += WIDTH) {
      const int block = entry / (ROWS_X * 8), row_x = entry / 8 % ROWS_X;
      const int warp_first = min(tile.block_first[2] + row_x / row_tile(2) * row_tile(2), n - 1);
      const int row = min(tile.block_first[2] + row_x, n - 1);
      const int column = first_column(2, warp_first, n) + block * 8 + entry % 8;
      const bool valid = block < box(2) / 8 && column >= first_column(2, row, n) && column < end_column(2, row, n);
      const int bias_x = bias_index(2, row, column);
#pragma unroll 4
      for (int line = threadIdx.x / WIDTH; line < LINES + 1; line += AT_ONCE) {
        float value = MINUS_INFINITY;
        if (valid && line < LINES) value = HAS_RPB ? bias[line * BIAS_X + bias_x] * factor : 0.f;
        reinterpret_cast<float*>(table)[line * FLOATS + entry] = value;
      }
    }
  }
};

class Start {
  unsigned entry[2];   // of rows g and g + 8: this lane's entry in a line
  unsigned lines[2];   // lines of the step that are the row's
  unsigned first[2];   // the entry in the table's line of the step's first line

 public:
  __device__ __forceinline__ Start(const Tile&, unsigned table_offset) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = threadIdx.x % 32 / 4 + 8 * half;
      const int row_x = int(threadIdx.x / 32) % warps(2) * row_tile(2) + row_coordinate(2, r);
      entry[half] = table_offset + row_x * 32 + threadIdx.x % 4 * 8;
    }
  }

  // The step whose first line is at `z`, `y` of the halo.
  __device__ __forceinline__ void to_step(const LaneRows& rows, int z, int y, int) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lines[half] = lines_within(z, y, rows.first[half][0], rows.end[half][0], rows.first[half][1], rows.end[half][1]);
      const int line = HAS_RPB ? bias_index(0, rows.row[half][0], z) * BIAS_Y + bias_index(1, rows.row[half][1], y) : 0;
      first[half] = entry[half] + line * StartTable::LINE_BYTES;
    }
  }

  __device__ static constexpr bool is_empty(int) { return false; }

  // Start values of group u of the step.
  __device__ __forceinline__ void load(const Shared& shared, int u, float (&start)[2][4]) const {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int line = group_line(u, second);
      const int bytes = BIAS_SIGN * (line / step(1) * BIAS_Y + line % step(1)) * (HAS_RPB ? StartTable::LINE_BYTES : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A single line is every row's.
        const bool has = box(0) * box(1) == 1 || (lines[half] >> line & 1);
        const unsigned at = has ? first[half] + bytes : entry[half] + StartTable::LINES * StartTable::LINE_BYTES;
        const float2 pair =
            *reinterpret_cast<const float2*>(shared.bytes + at + group_x(u, second) / 8 * StartTable::BLOCK_BYTES);
        start[second][2 * half] = pair.x;
        start[second][2 * half + 1] = pair.y;
      }
    }
  }
};

#else

// The whole bias of a head where that is little.
struct StartTable {
  static constexpr int BYTES = HAS_RPB && BIAS_BYTES <= NATRAIN_MOST_STAGED_BIAS ? (BIAS_BYTES + 15) / 16 * 16 : 0;
  static __device__ __forceinline__ void fill(unsigned char*, const Tile&, const float*, float) {}
};

class Start {
  unsigned lines[2];           // lines of the step that are the row's
  int x_first[2], x_count[2];  // columns of the row, from the step's first
  // The same for any row of the tile, and for all: equal in a warp.
  unsigned any_lines, all_lines;
  int any_first, any_end, all_first, all_end;
  const float* of_head;
  const float* bias[2];        // of the step's first column
  float factor;
  int tile_all_first[3], tile_all_end[3];
  int tile_any_first[3], tile_any_end[3];

 public:
  // `bias_data`: of this head, in global memory, or with a factor of 1 what stage_bias wrote.
  __device__ __forceinline__ Start(const Tile& tile, const float* bias_data, float bias_factor, Side side = ROWS)
      : of_head(bias_data), factor(bias_factor) {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      // First and last columns never decrease from row to row.
      const int n = tile.length[axis], last = tile.row(axis, 15);
      tile_any_first[axis] = tile.box_first[axis], tile_any_end[axis] = tile.box_end[axis];
      tile_all_first[axis] = first_column(axis, last, n, side) - tile.halo_first[axis];
      tile_all_end[axis] = end_column(axis, tile.row_first[axis], n, side) - tile.halo_first[axis];
    }
  }

  __device__ __forceinline__ void to_step(const LaneRows& rows, int z, int y, int x) {
    any_lines = lines_within(z, y, tile_any_first[0], tile_any_end[0], tile_any_first[1], tile_any_end[1]);
    all_lines = lines_within(z, y, tile_all_first[0], tile_all_end[0], tile_all_first[1], tile_all_end[1]);
    any_first = tile_any_first[2] - x, any_end = tile_any_end[2] - x;
    all_first = tile_all_first[2] - x, all_end = tile_all_end[2] - x;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lines[half] = lines_within(z, y, rows.first[half][0], rows.end[half][0], rows.first[half][1], rows.end[half][1]);
      x_first[half] = rows.first[half][2] - x;
      x_count[half] = rows.end[half][2] - rows.first[half][2];
      if (HAS_RPB)
        bias[half] = of_head + (bias_index(0, rows.row[half][0], z) * BIAS_Y + bias_index(1, rows.row[half][1], y)) *
                                        (long long)BIAS_X + bias_index(2, rows.row[half][2], x);
    }
  }

  // No row of the tile has a column in group u.
  __device__ __forceinline__ bool is_empty(int u) const {
    const int x = group_x(u, 0);
    return !(any_lines >> group_line(u, 0) & 1) || x + 16 <= any_first || x >= any_end;
  }

  __device__ __forceinline__ void load(const Shared&, int u, float (&start)[2][4]) const {
    const int line = group_line(u, 0), x = group_x(u, 0);
    if (!HAS_RPB && (all_lines >> line & 1) && x >= all_first && x + 16 <= all_end) {
#pragma unroll
      for (int i = 0; i < 8; ++i) start[i / 4][i % 4] = 0;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 4 / 2, column = x + i / 4 * 8 + int(threadIdx.x % 4) * 2 + i % 2;
      const bool valid = (lines[half] >> line & 1) && unsigned(column - x_first[half]) < unsigned(x_count[half]);
      float value = valid ? 0.f : MINUS_INFINITY;
      if (HAS_RPB && valid)
        value = bias[half][BIAS_SIGN * ((line / step(1) * BIAS_Y + line % step(1)) * BIAS_X + column)] * factor;
      start[i / 4][i % 4] = value;
    }
  }
};

#endif

}  // namespace natrain
