// What the two backward kernels share. Scores S and probabilities P are computed again from q, k and lse (as FlashAttention
// does, arXiv 2205.14135), in one pass over a tile's columns; nothing is added to memory by more than one warp, so that
// runs repeat bit by bit:
//   P = exp(S - lse), dP = d_out . v, dS = P * (dP - delta), delta = sum(d_out * out) - d_lse of a query;
//   rows are queries (backward_q.cu):  dQ = scale * dS K; also delta, and the bias gradient, a sum of dS;
//   rows are keys (backward_kv.cu):    dK = scale * dS^T Q, dV = P^T d_out, over all heads of q that share the key.
// With dropout P in dV and dP carry the mask and its factor.
#pragma once

#include "start.cuh"

namespace natrain {

struct Arguments {
  Geometry geometry;         // heads: of the rows; heads_per_kv: of q for one of them when rows are keys
  int partials;              // of the bias gradient for a head
  float scale;               // of q . k
  float keep_scale;          // 1 / (1 - dropout_p)
  unsigned drop_threshold;
  const Element *q, *k, *v, *out, *d_out;
  const float *lse, *d_lse;  // [B, Z, Y, X, N]; d_lse may be null
  Element *d_q, *d_k, *d_v;
  float2* statistics;        // [B, N, Z, Y, X]: lse in powers of two, and delta; written where rows are queries
  float* bias_partial;       // [N, partials, entries], written where rows are queries
  float* d_rpb;              // [N, entries], written where rows are keys
  const float* rpb;          // [N, 2kz-1, 2ky-1, 2kx-1], read when NATRAIN_HAS_RPB
  const unsigned char* key_mask;  // [B, Z, Y, X], not 0: may be attended; read when NATRAIN_HAS_KEY_MASK
  const long long* seed;     // read when NATRAIN_HAS_DROPOUT
  Layout q_at, k_at, v_at, out_at, d_out_at, d_q_at, d_k_at, d_v_at;
};

constexpr int STAGES = NATRAIN_STAGES;
constexpr bool HAS_DROPOUT = NATRAIN_HAS_DROPOUT, HAS_KEY_MASK = NATRAIN_HAS_KEY_MASK;
// A stage: columns of k and v (q and d_out), their statistics where they are queries.
constexpr int COLUMNS_1_BYTES = CHUNK_TOKENS * RowFormat<HEAD_DIM>::PITCH;
constexpr int COLUMNS_2_BYTES = CHUNK_TOKENS * RowFormat<VALUE_DIM>::PITCH;
constexpr int STATISTICS_BYTES = ROWS_ARE_KEYS ? CHUNK_TOKENS * 8 : 0;
constexpr int STAGE_BYTES = (COLUMNS_1_BYTES + COLUMNS_2_BYTES + STATISTICS_BYTES + 127) / 128 * 128;
// A warp's rows of q, d_out and out (k and v), as many times as there are stages; its gradients leave through them.
constexpr int ROWS_1_BYTES = 16 * RowFormat<HEAD_DIM>::PITCH, ROWS_2_BYTES = 16 * RowFormat<VALUE_DIM>::PITCH;
constexpr int ROWS_BYTES = ROWS_1_BYTES + ROWS_2_BYTES * (ROWS_ARE_KEYS ? 1 : 2);
constexpr int ROWS_AT = STAGES * STAGE_BYTES;
constexpr int TABLE_AT = ROWS_AT + STAGES * WARPS * ROWS_BYTES;
constexpr int AFTER_TABLE = (TABLE_AT + StartTable::BYTES + 15) / 16 * 16;

constexpr int ENTRIES = BIAS_LINES * BIAS_X;

// Tokens from a step's first column to that of its group u.
__device__ constexpr int group_tokens(int u) { return group_bytes<HEAD_DIM>(u) / RowFormat<HEAD_DIM>::PITCH; }

// Where a stage's tokens are: the head of q `member` of those that share a key, the chunk's first position in the halo.
struct Place {
  int image, member;
  int at[3];

  __device__ __forceinline__ explicit Place(const Tile& tile) : image(tile.first_image), member(0), at{0, 0, 0} {}

  __device__ __forceinline__ bool is_first() const { return RESIDENT || (at[0] == 0 && at[1] == 0 && at[2] == 0); }
  __device__ __forceinline__ bool is_last(const Tile& tile) const {
    bool is = true;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis)
      is = is && tile.halo_first[axis] + at[axis] + chunk(axis) >= tile.halo_end[axis];
    return RESIDENT || is;
  }
  __device__ __forceinline__ void advance(const Tile& tile, const Geometry& g) {
    if (!RESIDENT) {
#pragma unroll
      for (int axis = 2; axis >= 0; --axis) {
        at[axis] += chunk(axis);
        if (tile.halo_first[axis] + at[axis] < tile.halo_end[axis]) return;
        at[axis] = 0;
      }
    }
    if (ROWS_ARE_KEYS && ++member < g.heads_per_kv) return;
    member = 0;
    image += g.splits;
  }
};

// The stages of shared memory, fetched ahead of use.
class Stream {
  const Arguments& args;
  const Tile& tile;
  const unsigned address;
  const Step step_1, step_2, row_step_1, row_step_2;
  Place place;  // of the next stage
  int stage = 0, rows = 0;

 public:
  __device__ __forceinline__ Stream(const Arguments& arguments, const Tile& t, unsigned shared_address)
      : args(arguments),
        tile(t),
        address(shared_address),
        step_1(args.geometry, ROWS_ARE_KEYS ? args.q_at : args.k_at),
        step_2(args.geometry, ROWS_ARE_KEYS ? args.d_out_at : args.v_at),
        row_step_1(args.geometry, ROWS_ARE_KEYS ? args.k_at : args.q_at),
        row_step_2(args.geometry, ROWS_ARE_KEYS ? args.v_at : args.d_out_at),
        place(t) {}

  __device__ __forceinline__ void fetch() {
    const Geometry& g = args.geometry;
    if (place.image < g.batch) {
      const int head = tile.head, other = ROWS_ARE_KEYS ? head * g.heads_per_kv + place.member : head / g.heads_per_kv;
      const int first[3] = {tile.halo_first[0] + place.at[0], tile.halo_first[1] + place.at[1],
                            tile.halo_first[2] + place.at[2]};
      const unsigned to = address + stage * STAGE_BYTES;
      fetch_columns<HEAD_DIM>(to, ROWS_ARE_KEYS ? of(args.q, args.q_at, other) : of(args.k, args.k_at, other), step_1, tile,
                              first[0], first[1], first[2]);
      fetch_columns<VALUE_DIM>(to + COLUMNS_1_BYTES,
                               ROWS_ARE_KEYS ? of(args.d_out, args.d_out_at, other) : of(args.v, args.v_at, other), step_2,
                               tile, first[0], first[1], first[2]);
      if constexpr (ROWS_ARE_KEYS) fetch_statistics(to + COLUMNS_1_BYTES + COLUMNS_2_BYTES, other, first);
      if (place.is_first()) {
        const int r = threadIdx.x % 16;
        const unsigned at = address + rows_at(rows);
        const Offset offset_1 = row_offset(tile, row_step_1, r), offset_2 = row_offset(tile, row_step_2, r);
        fetch_rows<HEAD_DIM>(at, ROWS_ARE_KEYS ? of(args.k, args.k_at, head) : of(args.q, args.q_at, head), offset_1);
        fetch_rows<VALUE_DIM>(at + ROWS_1_BYTES,
                              ROWS_ARE_KEYS ? of(args.v, args.v_at, head) : of(args.d_out, args.d_out_at, head), offset_2);
        if constexpr (!ROWS_ARE_KEYS)
          fetch_rows<VALUE_DIM>(at + ROWS_1_BYTES + ROWS_2_BYTES, of(args.out, args.out_at, head),
                                row_offset(tile, Step(g, args.out_at), r));
        rows = rows + 1 == STAGES ? 0 : rows + 1;
      }
      place.advance(tile, g);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_commit();
  }

  // Bytes to this warp's rows in buffer `i`.
  static __device__ __forceinline__ unsigned rows_at(int i) { return ROWS_AT + (i * WARPS + threadIdx.x / 32) * ROWS_BYTES; }

 private:
  __device__ __forceinline__ const Element* of(const Element* data, const Layout& at, int head) const {
    return data + place.image * at.batch + tile.group_origin(at, head);
  }

  // Zeros past the end of the group, where the start values are -inf.
  __device__ __forceinline__ void fetch_statistics(unsigned to, int head, const int (&first)[3]) const {
    const Geometry& g = args.geometry;
    const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];
    const float2* from = args.statistics + (place.image * (long long)(g.heads * g.heads_per_kv) + head) * tokens;
#pragma unroll 2
    for (int i = threadIdx.x; i < CHUNK_TOKENS; i += THREADS) {
      const int in_chunk[3] = {i / (chunk(2) * chunk(1)), i / chunk(2) % chunk(1), i % chunk(2)};
      bool valid = true;
      int token = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        const int position = first[axis] + in_chunk[axis];
        valid = valid && position < tile.length[axis];
        token = token * g.length[axis] + position * g.dilation[axis] + tile.group[axis];
      }
      cp_async_8(to + i * 8, from + token, valid);
    }
  }
};

// The columns of a lane in one group, in positions of the dilation group: 2t, 2t + 1 of both n8 blocks.
struct LaneColumns {
  int z, y, x;  // of the step's first column

  __device__ __forceinline__ void locate(int u, int i, int (&position)[3]) const {
    const int line = group_line(u, i / 4);
    position[0] = z + line / step(1);
    position[1] = y + line % step(1);
    position[2] = x + group_x(u, i / 4) + int(threadIdx.x % 4) * 2 + i % 2;
  }
};

// Token of a position in its image; positions past the end of the group count as the last one.
__device__ __forceinline__ int token_of(const Tile& tile, const Geometry& g, const int (&position)[3]) {
  int token = 0;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis)
    token = token * g.length[axis] + min(position[axis], tile.length[axis] - 1) * g.dilation[axis] + tile.group[axis];
  return token;
}

// Slot of `key` in the window of `query`.
__device__ __forceinline__ int slot_of(const Tile& tile, const int (&query)[3], const int (&key)[3]) {
  int slot = 0;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis)
    slot = slot * kernel_size(axis) + key[axis] -
           window_start(query[axis], tile.length[axis], kernel_size(axis), window_stride(axis), is_causal(axis));
  return slot;
}

// No row of the warp's tile has a column in group u of the step at `z`, `y`, `x` of the halo.
__device__ __forceinline__ bool is_past(const Tile& tile, int z, int y, int x, int u) {
  const int line = group_line(u, 0);
  return z + line / step(1) >= tile.box_end[0] || y + line % step(1) >= tile.box_end[1] ||
         x + group_x(u, 0) >= tile.box_end[2];
}

// Calls visit(z, y, x) for every step of the chunk at `place` that the warp's box meets, with its first column in positions
// of the halo.
template <class Visit>
__device__ __forceinline__ void for_each_step(const Tile& tile, const Place& place, Visit visit) {
  if constexpr (RESIDENT) {
    visit(tile.box_first[0], tile.box_first[1], tile.box_first[2]);
  } else {
    const int x = CHUNKED_X ? place.at[2] : tile.box_first[2];
    if (CHUNKED_X && (x + chunk(2) <= tile.box_first[2] || x >= tile.box_end[2])) return;
#pragma unroll 1
    for (int z = place.at[0]; z < place.at[0] + chunk(0); z += step(0)) {
      if (z + step(0) <= tile.box_first[0] || z >= tile.box_end[0]) continue;
#pragma unroll 1
      for (int y = place.at[1]; y < place.at[1] + chunk(1); y += step(1)) {
        if (y + step(1) <= tile.box_first[1] || y >= tile.box_end[1]) continue;
        visit(z, y, x);
      }
    }
  }
}

__device__ __forceinline__ long long dropout_row(const Geometry& g, int image, int heads, int head, int token) {
  return ((long long)image * heads + head) * ((long long)g.length[0] * g.length[1] * g.length[2]) + token;
}

}  // namespace natrain
