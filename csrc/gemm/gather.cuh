// The weighted sums of both directions: out[row] = scale * sum over the columns it reaches of weight * row of x.
// av: rows are queries, and each one's own weights hold its keys' slots. inverse: rows are keys, and the weights of every
// query whose window holds the key hold the key's slot.
#pragma once

#include "products.cuh"

namespace natrain {

struct GatherArguments {
  Geometry geometry;
  double scale;
  const Element* weights;
  const Element* x;
  Element* out;
  Layout weights_at, x_at, out_at;
};

constexpr int KY = kernel_size(1), KX = kernel_size(2);
// Weights are copied into shared memory, where that has room for them (of a warp's queries, or of the halo's).
constexpr bool IS_STAGED = NATRAIN_IS_STAGED;
static_assert(!(IS_STAGED && BY_KEY && CHUNKS > 1));
static_assert(IS_FLOAT || COLUMNS == 16);
constexpr int X_PITCH = row_pitch(IS_FLOAT), WEIGHTS_PITCH = PITCH * sizeof(Element), OUT_PITCH = row_pitch(false);
constexpr int WEIGHTS_AT = STAGES * CHUNK * X_PITCH;
constexpr int WEIGHT_ROWS = !IS_STAGED ? 0 : BY_KEY ? HALO : WARPS * ROWS;
// Staged weights are read before it is known that they are any pair's: up to a line before the first row and past the last.
constexpr int SLACK = IS_STAGED ? ((halo(2) + COLUMNS) * int(sizeof(Element)) + 15) / 16 * 16 : 0;
static_assert(WEIGHTS_AT >= SLACK);
// The sums go out through the same memory.
constexpr int FETCHED_BYTES = WEIGHTS_AT + WEIGHT_ROWS * WEIGHTS_PITCH + SLACK, OUT_BYTES = WARPS * ROWS * OUT_PITCH;
static_assert((FETCHED_BYTES > OUT_BYTES ? FETCHED_BYTES : OUT_BYTES) == NATRAIN_SHARED_BYTES);

// Windows of a query at `position` along an axis, counted from `origin`; a count of 0 for a position that is none.
struct Span {
  int first, count;

  __device__ __forceinline__ Span(int axis, int position, int n, int origin) {
    const int k = kernel_size(axis), s = window_stride(axis);
    const int inside = min(position, n - 1), start = window_start(inside, n, k, s, is_causal(axis));
    first = start - origin;
    count = position < n ? window_end(inside, n, k, s, is_causal(axis)) - start : 0;
  }
  __device__ __forceinline__ bool holds(int key) const { return unsigned(key - first) < unsigned(count); }
};

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned bits_of(float16 x) { return x.bits; }
__device__ __forceinline__ unsigned bits_of(bfloat16 x) { return x.bits; }

constexpr int WIDTH = IS_FLOAT ? 1 : 2;  // weights a word

// A word of weights at `first` (and `second`), where `mask` has bits.
__device__ __forceinline__ unsigned load_word(const Element* first, const Element* second, unsigned mask) {
  if (IS_STAGED) {
    const unsigned word = IS_FLOAT ? bits_of(*first) : bits_of(*first) | bits_of(*second) << 16;
    return word & mask;
  }
  unsigned word = mask & 0xffffu ? bits_of(*first) : 0;
  if (!IS_FLOAT && mask >> 16) word |= bits_of(*second) << 16;
  return word;
}

__device__ __forceinline__ unsigned mask_of(bool holds, int element) {
  return !holds ? 0 : IS_FLOAT ? 0xffffffffu : 0xffffu << 16 * element;
}

// av: the lane's two queries.
struct QueryRows {
  const Element* weights[2];
  Span z[2], y[2], x[2];

  __device__ __forceinline__ static Span span(const Tile& tile, int axis, int i) {
    return Span(axis, tile.row(axis, tile.lane / 4 + 8 * i), tile.length[axis], tile.halo_first[axis]);
  }
  __device__ __forceinline__ QueryRows(const Tile& tile, const Element* staged, const Element* origin, const Step& step)
      : z{span(tile, 0, 0), span(tile, 0, 1)}, y{span(tile, 1, 0), span(tile, 1, 1)}, x{span(tile, 2, 0), span(tile, 2, 1)} {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = tile.lane / 4 + 8 * i;
      weights[i] = IS_STAGED ? staged + (tile.warp * ROWS + r) * PITCH : origin + step.to_row(tile, r);
    }
  }
};

__device__ __forceinline__ void sum_by_query(const Tile& tile, const QueryRows& rows, int chunk, int stage,
                                             const unsigned char* shared, float (&sums)[BLOCKS][4]) {
  for (int block = first_x(tile, chunk); block < end_x(tile, chunk); block += COLUMNS) {
    const Element* first[2];  // weight of column own_column(lane, 0) in the first line of either window
    unsigned masks[2 * PAIRS] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[i] = rows.weights[i] + (block + own_column(tile.lane, 0) - rows.x[i].first);
#pragma unroll
      for (int p = 0; p < PAIRS; ++p)
#pragma unroll
        for (int e = 0; e < WIDTH; ++e)
          masks[2 * p + i] |= mask_of(rows.x[i].holds(block + own_column(tile.lane, p) + e), e);
    }
    for_each_line(tile, chunk, block, [&](int z, int y, int row) {
      unsigned weights[2 * PAIRS];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool has_line = rows.z[i].holds(z) && rows.y[i].holds(y);
        const Element* line = first[i] + (has_line ? ((z - rows.z[i].first) * KY + (y - rows.y[i].first)) * KX : 0);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
          const Element* at = line + (own_column(0, p) - own_column(0, 0));
          weights[2 * p + i] = load_word(at, at + 1, has_line ? masks[2 * p + i] : 0);
        }
      }
      weighted_sums(weights, (stage + row) * X_PITCH, shared, tile.lane, sums);
    });
  }
}

// inverse: the lane's two keys.
struct KeyRows {
  int key[2][3];
  const Element* weights;  // of the halo's first query, or of the dilation group's
  Step step;               // from one query to the next

  __device__ __forceinline__ KeyRows(const Tile& tile, const Element* staged, const Element* origin, const Step& step)
      : weights(IS_STAGED ? staged : origin), step(step) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) key[i][axis] = tile.row(axis, tile.lane / 4 + 8 * i);
  }
};

__device__ __forceinline__ void sum_by_key(const Tile& tile, const KeyRows& rows, int chunk, int stage,
                                           const unsigned char* shared, float (&sums)[BLOCKS][4]) {
  // Keys 8 rows apart stand in the same column unless a warp's rows are one line of 16.
  constexpr int APART = row_tile(2) == ROWS ? 2 : 1;
  for (int block = first_x(tile, chunk); block < end_x(tile, chunk); block += COLUMNS) {
    // Of the lane's queries in a line: where either key's weight lies, in the first line of the query's window.
    Offset query[APART][PAIRS * WIDTH];
    unsigned masks[2 * PAIRS] = {};
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        const int x = block + own_column(tile.lane, p) + e, position = tile.halo_first[2] + x;
        const Span span(2, position, tile.length[2], 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int slot = rows.key[i][2] - span.first;
          if (i < APART) query[i][p * WIDTH + e] = (IS_STAGED ? Offset(x * PITCH) : rows.step.x * position) + slot;
          masks[2 * p + i] |= mask_of(span.holds(rows.key[i][2]), e);
        }
      }
    for_each_line(tile, chunk, block, [&](int z, int y, int row) {
      const int query_z = tile.halo_first[0] + z, query_y = tile.halo_first[1] + y;
      const Span span_z(0, query_z, tile.length[0], 0), span_y(1, query_y, tile.length[1], 0);
      const Element* line =
          rows.weights + (IS_STAGED ? Offset((z * halo(1) + y) * halo(2) * PITCH) : rows.step.to(query_z, query_y, 0));
      unsigned weights[2 * PAIRS];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool has_line = span_z.holds(rows.key[i][0]) && span_y.holds(rows.key[i][1]);
        const int slot = ((rows.key[i][0] - span_z.first) * KY + (rows.key[i][1] - span_y.first)) * KX;
        const Element* own_line = line + (has_line ? slot : 0);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
          const Offset(&from)[PAIRS * WIDTH] = query[i < APART ? i : 0];
          weights[2 * p + i] = load_word(own_line + from[p * WIDTH], own_line + from[p * WIDTH + WIDTH - 1],
                                         has_line ? masks[2 * p + i] : 0);
        }
      }
      weighted_sums(weights, (stage + row) * X_PITCH, shared, tile.lane, sums);
    });
  }
}

// The warp's rows of sums once more, into `own`, from global memory and over pairs alone: a weight of 0 times a NaN is a NaN,
// which must not reach rows whose window does not hold it. A function of its own, since it is rare and needs registers.
__device__ __noinline__ void sum_pairs(const GatherArguments& args, Element* own) {
  const Tile tile(args.geometry, SLICES);
  const Element* const weights = tile.origin(args.weights, args.weights_at);
  const Element* const x_origin = tile.origin(args.x, args.x_at) + tile.slice * HEAD_DIM;
  const Step weights_step(args.geometry, args.weights_at), x_step(args.geometry, args.x_at);
  for (int i = tile.lane; i < ROWS * HEAD_DIM; i += 32) {
    const int r = i / HEAD_DIM, component = i % HEAD_DIM;
    float sum = 0;
    for (int z = tile.box_first[0]; z < tile.box_end[0]; ++z)
      for (int y = tile.box_first[1]; y < tile.box_end[1]; ++y)
        for (int x = tile.box_first[2]; x < tile.box_end[2]; ++x) {
          const int column[3] = {z + tile.halo_first[0], y + tile.halo_first[1], x + tile.halo_first[2]};
          int query[3], slot = 0;
          bool holds = true;
#pragma unroll
          for (int axis = 0; axis < 3; ++axis) {
            const int row = tile.row(axis, r), key = BY_KEY ? row : column[axis];
            query[axis] = BY_KEY ? column[axis] : row;
            const Span span(axis, query[axis], tile.length[axis], 0);
            holds = holds && span.holds(key);
            slot = slot * kernel_size(axis) + key - span.first;
          }
          if (!holds) continue;
          const Offset of_query = weights_step.to(query[0], query[1], query[2]);
          const Offset of_column = x_step.to(column[0], column[1], column[2]);
          sum += widen(weights[of_query + slot]) * widen(x_origin[of_column + component]);
        }
    own[r * (OUT_PITCH / int(sizeof(Element))) + component] = narrow<Element>(sum * float(args.scale));
  }
}

__device__ __forceinline__ void gather(const GatherArguments& args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  const Tile tile(args.geometry, SLICES);
  const Element* const x = args.x + tile.slice * HEAD_DIM;
  const unsigned shared_at = shared_address(shared);
  if constexpr (IS_STAGED && BY_KEY)
    fetch_chunk<WEIGHT_PIECES, WEIGHT_PIECES>(tile, args.geometry, args.weights, args.weights_at, 0,
                                              shared_at + WEIGHTS_AT, WEIGHTS_PITCH);
  if constexpr (IS_STAGED && !BY_KEY)
    fetch_own<WEIGHT_PIECES, WEIGHT_PIECES>(tile, args.geometry, args.weights, args.weights_at,
                                            shared_at + WEIGHTS_AT + tile.warp * ROWS * WEIGHTS_PITCH, WEIGHTS_PITCH);

  float sums[BLOCKS][4] = {};
  const Element* staged = reinterpret_cast<const Element*>(shared + WEIGHTS_AT);
  const Element* origin = tile.origin(args.weights, args.weights_at);
  const Step step(args.geometry, args.weights_at);
  if constexpr (BY_KEY) {
    const KeyRows rows(tile, staged, origin, step);
    for_each_chunk<PIECES, PIECES>(tile, args.geometry, x, args.x_at, shared_at, X_PITCH, [&](int chunk, int stage) {
      sum_by_key(tile, rows, chunk, stage, shared, sums);
    });
  } else {
    const QueryRows rows(tile, staged, origin, step);
    for_each_chunk<PIECES, PIECES>(tile, args.geometry, x, args.x_at, shared_at, X_PITCH, [&](int chunk, int stage) {
      sum_by_query(tile, rows, chunk, stage, shared, sums);
    });
  }
  __syncthreads();
  if (!tile.is_active) return;

  unsigned char* const own = shared + tile.warp * ROWS * OUT_PITCH;
  const bool has_nan = put_sums(sums, float(args.scale), tile.lane, own);
  if (__any_sync(WARP, has_nan)) {
    __syncwarp();
    sum_pairs(args, reinterpret_cast<Element*>(own));
  }
  __syncwarp();
  store_own<PIECES>(tile, args.geometry, own, OUT_PITCH, args.out + tile.slice * HEAD_DIM, args.out_at);
}

}  // namespace natrain
