// Rows of D elements in shared memory: where they lie, how they get there, how fragments of an mma are read from them.
#pragma once

#include "geometry.cuh"
#include "tf32.cuh"

namespace natrain {

// A row is a run of 16-byte chunks. Eight rows from any column on must lie in eight different bank groups for ldmatrix:
// where the chunks of a row are a power of two they are permuted by the column (so that a line's address is the only
// thing that changes from line to line, by a constant), else rows are padded to an odd number of chunks.
template <int DIM>
struct RowFormat {
  static constexpr int CHUNKS = DIM * int(sizeof(Element)) / 16;
  static constexpr bool SWIZZLED = sizeof(Element) == 2 && (CHUNKS & (CHUNKS - 1)) == 0;
  static constexpr int PITCH = (SWIZZLED ? CHUNKS : CHUNKS | 1) * 16;
  static constexpr int PER_PERIOD = CHUNKS < 8 ? 8 / CHUNKS : 1;  // rows that share all the banks
  // A line must begin at the start of such a period.
  static_assert(!SWIZZLED || chunk(2) % PER_PERIOD == 0);

  static __device__ __forceinline__ unsigned key(int column) {
    return SWIZZLED ? unsigned(column) / PER_PERIOD % (CHUNKS < 8 ? CHUNKS : 8) : 0;
  }
  // Bytes from a line's start.
  static __device__ __forceinline__ unsigned at(int column, int piece) {
    return column * PITCH + (unsigned(piece) ^ key(column)) * 16;
  }
};

// Of the columns of a chunk; what follows begins at a multiple of 128 bytes, as permuted pieces must.
template <int DIM>
__device__ constexpr int columns_bytes() {
  return (CHUNK_TOKENS * RowFormat<DIM>::PITCH + 127) / 128 * 128;
}

// Columns that the boxes of a block's warps cover together, about.
constexpr int COVERED = (box(0) + (warps(0) - 1) * row_tile(0)) * (box(1) + (warps(1) - 1) * row_tile(1)) *
                        (box(2) + (warps(2) - 1) * row_tile(2));
// Whether factors of TF32 products are rounded in shared memory, once for all their uses: where those are two or more.
constexpr bool IS_ROUNDED =
    NATRAIN_TF32_TERMS == 1 && NATRAIN_COLUMN_USES * WARPS * box(0) * box(1) * box(2) >= 2 * COVERED;

// The columns of one stage, positions `first` .. first + chunk - 1 of the group; zeros past `fetch_end`.
template <int DIM>
__device__ __forceinline__ void fetch_columns(unsigned shared, const Element* origin, const Step& stride, const Tile& tile,
                                              int z_first, int y_first, int x_first) {
  using Format = RowFormat<DIM>;
  // Threads side by side along a row of D, then x, then lines, so that only the line changes in the loop.
  constexpr int MOST = THREADS / Format::CHUNKS;
  static_assert(MOST > 0);
  constexpr int AT_ONCE_X = MOST < chunk(2) ? MOST : chunk(2), AT_ONCE_Y = MOST / AT_ONCE_X;
  const int thread = threadIdx.x;
  const int piece = thread % Format::CHUNKS, x_thread = thread / Format::CHUNKS % AT_ONCE_X;
  const int y_thread = thread / (Format::CHUNKS * AT_ONCE_X);
  if (y_thread >= AT_ONCE_Y) return;
#pragma unroll
  for (int x0 = 0; x0 < chunk(2); x0 += AT_ONCE_X) {
    const int x = x0 + x_thread;
    if (chunk(2) % AT_ONCE_X != 0 && x >= chunk(2)) break;
    const bool has_x = x_first + x < tile.fetch_end(2);
    const Offset column = stride.to[2] * (x_first + x) + stride.to[1] * (y_first + y_thread) + stride.to[0] * z_first +
                          piece * int(16 / sizeof(Element));
    const unsigned to = shared + y_thread * chunk(2) * Format::PITCH + Format::at(x, piece);
#pragma unroll
    for (int z = 0; z < chunk(0); ++z) {
      const bool has_z = has_x && z_first + z < tile.fetch_end(0);
      const Element* from = origin + (column + stride.to[0] * z);
#pragma unroll
      for (int y = 0; y < chunk(1); y += AT_ONCE_Y) {
        if (chunk(1) % AT_ONCE_Y != 0 && y + y_thread >= chunk(1)) break;
        const bool valid = has_z && y_first + y + y_thread < tile.fetch_end(1);
        cp_async_16(to + (z * chunk(1) + y) * chunk(2) * Format::PITCH, from, valid);
        from += stride.to[1] * AT_ONCE_Y;
      }
    }
  }
}

// Rounds, where IS_ROUNDED, what this thread has fetched by fetch_columns, once it is there. The loops of fetch_columns once
// more: a struct that both shared cost the fetches of wide heads a factor of two (docs/performance.md).
template <int DIM>
__device__ __forceinline__ void round_columns(unsigned char* shared) {
  if constexpr (IS_ROUNDED) {
    using Format = RowFormat<DIM>;
    constexpr int MOST = THREADS / Format::CHUNKS;
    constexpr int AT_ONCE_X = MOST < chunk(2) ? MOST : chunk(2), AT_ONCE_Y = MOST / AT_ONCE_X;
    const int thread = threadIdx.x;
    const int piece = thread % Format::CHUNKS, x_thread = thread / Format::CHUNKS % AT_ONCE_X;
    const int y_thread = thread / (Format::CHUNKS * AT_ONCE_X);
    if (y_thread >= AT_ONCE_Y) return;
#pragma unroll
    for (int x0 = 0; x0 < chunk(2); x0 += AT_ONCE_X) {
      const int x = x0 + x_thread;
      if (chunk(2) % AT_ONCE_X != 0 && x >= chunk(2)) break;
      unsigned char* const from = shared + y_thread * chunk(2) * Format::PITCH + Format::at(x, piece);
#pragma unroll
      for (int z = 0; z < chunk(0); ++z) {
#pragma unroll
        for (int y = 0; y < chunk(1); y += AT_ONCE_Y) {
          if (chunk(1) % AT_ONCE_Y != 0 && y + y_thread >= chunk(1)) break;
          round_piece(from + (z * chunk(1) + y) * chunk(2) * Format::PITCH);
        }
      }
    }
  }
}

// The 16 rows of this warp's tile; `offset`: of row lane % 16 from `origin`. Rows past the end repeat the last one.
template <int DIM>
__device__ __forceinline__ void fetch_rows(unsigned shared, const Element* origin, Offset offset) {
  using Format = RowFormat<DIM>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 16 * Format::CHUNKS; i += 32) {
    const int row = (i + lane) / Format::CHUNKS % 16, piece = (i + lane) % Format::CHUNKS;
    const Offset from = __shfl_sync(WARP, offset, row);
    if (16 * Format::CHUNKS % 32 == 0 || i + lane < 16 * Format::CHUNKS)
      cp_async_16(shared + Format::at(row, piece), origin + from + piece * int(16 / sizeof(Element)), true);
  }
}

// The reverse, of plain shared memory in that format; row r is written where bit r of `rows` is set.
template <int DIM>
__device__ __forceinline__ void store_rows(const unsigned char* shared, Element* origin, Offset offset, unsigned rows) {
  using Format = RowFormat<DIM>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 16 * Format::CHUNKS; i += 32) {
    const int row = (i + lane) / Format::CHUNKS % 16, piece = (i + lane) % Format::CHUNKS;
    const Offset to = __shfl_sync(WARP, offset, row);
    if ((16 * Format::CHUNKS % 32 == 0 || i + lane < 16 * Format::CHUNKS) && (rows >> row & 1))
      *reinterpret_cast<uint4*>(origin + to + piece * int(16 / sizeof(Element))) =
          *reinterpret_cast<const uint4*>(shared + Format::at(row, piece));
  }
}

}  // namespace natrain
