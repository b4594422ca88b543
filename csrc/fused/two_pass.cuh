// What the two kernels of backward share that take two passes, queries first (backward_q.cu), then keys (backward_kv.cu):
// stages of shared memory with two matrices of columns, whole halos or chunks of them, any feature.
#pragma once

#include "backward.cuh"

namespace natrain {

// Groups of columns that are computed without a branch in between, so that one does not wait for what another waits for:
// where loops over chunks, or the sums of the bias gradient, leave the registers for it.
constexpr int MOST_REGISTERS = 65536 / (THREADS * NATRAIN_MIN_BLOCKS);
constexpr int AT_ONCE = RESIDENT && MOST_REGISTERS >= (ROWS_ARE_KEYS ? 168 : 192) ? 2 : 1;
static_assert(AT_ONCE <= 2);

// A stage: columns of k and v (q and d_out), their statistics where they are queries.
constexpr int COLUMNS_1_BYTES = columns_bytes<HEAD_DIM>();
constexpr int COLUMNS_2_BYTES = columns_bytes<VALUE_DIM>();
constexpr int STATISTICS_BYTES = ROWS_ARE_KEYS ? CHUNK_TOKENS * 8 : 0;
constexpr int STAGE_BYTES = (COLUMNS_1_BYTES + COLUMNS_2_BYTES + STATISTICS_BYTES + 127) / 128 * 128;
// A warp's rows of q, d_out and out (k and v), as many times as there are stages; its gradients leave through them.
constexpr int ROWS_1_BYTES = 16 * RowFormat<HEAD_DIM>::PITCH, ROWS_2_BYTES = 16 * RowFormat<VALUE_DIM>::PITCH;
constexpr int ROWS_BYTES = ROWS_1_BYTES + ROWS_2_BYTES * (ROWS_ARE_KEYS ? 1 : 2);
constexpr int ROWS_AT = STAGES * STAGE_BYTES;
constexpr int TABLE_AT = ROWS_AT + STAGES * WARPS * ROWS_BYTES;
constexpr int AFTER_TABLE = (TABLE_AT + StartTable::BYTES + 15) / 16 * 16;

// Start values of `tile`'s head, visible after the next barrier; while the last stage is not fetched yet.
__device__ __forceinline__ void fill_table(unsigned char* shared, const Tile& tile, const float* rpb, const Scale& scale) {
  if (HAS_RPB && START_TABLE && BIAS_BYTES <= STAGE_BYTES) {
    float* const scratch = reinterpret_cast<float*>(shared + (STAGES - 1) * STAGE_BYTES);
    stage_bias(scratch, tile, rpb, scale.per_scale);
    StartTable::fill(shared + TABLE_AT, tile, scratch, 1);
  } else {
    StartTable::fill(shared + TABLE_AT, tile, bias_of_head(rpb, tile), scale.per_scale);
  }
}

static_assert(!WALKS || !(IS_GROUPED || HAS_KEY_MASK || HAS_DROPOUT));

// Where a stage's tokens are: the head of q `member` of those that share a key, the chunk's first position in the halo.
struct Place : Visit {
  int member;
  int at[3];

  __device__ __forceinline__ explicit Place(const Tile& tile) : Visit(tile), member(0), at{0, 0, 0} {}

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
    if (ROWS_ARE_KEYS && IS_GROUPED) {
      if (++member < g.heads_per_kv) return;
      member = 0;
    }
    Visit::advance(tile, g);
  }
  __device__ __forceinline__ Visit next_visit(const Tile& tile, const Geometry& g) const {
    Visit next = *this;
    next.advance(tile, g);
    return next;
  }
};

// The reverse of store_row.
template <int DIM>
__device__ __forceinline__ void fetch_row(unsigned shared, const Element* row) {
  using Format = RowFormat<DIM>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < Format::CHUNKS; first += 2) {
    const int piece = first + lane % 2;
    if (first + 2 <= Format::CHUNKS || piece < Format::CHUNKS)
      cp_async_16(shared + Format::at(lane / 2, piece), row + piece * int(16 / sizeof(Element)), true);
  }
}
// Of the first image's `head`: this lane's row of the tile.
template <class T>
__device__ __forceinline__ T* lane_row(const Geometry& g, const Tile& tile, T* data, const Layout& at, int head) {
  return data + (tile.first_image * at.batch + tile.group_origin(at, head) + row_offset(tile, Step(g, at), threadIdx.x % 32 / 2));
}

// The stages of shared memory, fetched ahead of use. Pointers are those of the next stage, and move from visit to visit.
class Stream {
  const Geometry& g;
  const Tile& tile;
  const unsigned address;
  const Layout &columns_1_at, &columns_2_at, &rows_1_at, &rows_2_at, &rows_3_at;
  const Step step_1, step_2;
  const Element *columns_1, *columns_2;      // at the first token of the dilation group
  const Element *row_1, *row_2, *row_3;      // of this lane
  const float2* statistics;
  const int tokens;
  Place place;
  int stage = 0, rows = 0;

 public:
  __device__ __forceinline__ Stream(const Arguments& args, const Tile& t, unsigned shared_address)
      : g(args.geometry),
        tile(t),
        address(shared_address),
        columns_1_at(ROWS_ARE_KEYS ? args.q_at : args.k_at),
        columns_2_at(ROWS_ARE_KEYS ? args.d_out_at : args.v_at),
        rows_1_at(ROWS_ARE_KEYS ? args.k_at : args.q_at),
        rows_2_at(ROWS_ARE_KEYS ? args.v_at : args.d_out_at),
        rows_3_at(args.out_at),
        step_1(g, columns_1_at),
        step_2(g, columns_2_at),
        tokens(g.length[0] * g.length[1] * g.length[2]),
        place(t) {
    const int other = ROWS_ARE_KEYS ? t.head * heads_per_kv(g) : t.head / heads_per_kv(g);
    columns_1 = (ROWS_ARE_KEYS ? args.q : args.k) + (t.first_image * columns_1_at.batch + t.group_origin(columns_1_at, other));
    columns_2 =
        (ROWS_ARE_KEYS ? args.d_out : args.v) + (t.first_image * columns_2_at.batch + t.group_origin(columns_2_at, other));
    row_1 = lane_row(g, t, ROWS_ARE_KEYS ? args.k : args.q, rows_1_at, t.head);
    row_2 = lane_row(g, t, ROWS_ARE_KEYS ? args.v : args.d_out, rows_2_at, t.head);
    row_3 = ROWS_ARE_KEYS ? nullptr : lane_row(g, t, args.out, rows_3_at, t.head);
    statistics = args.statistics + (t.first_image * (long long)(g.heads * heads_per_kv(g)) + other) * tokens;
  }

  __device__ __forceinline__ void fetch() {
    begin_fetch();
    end_fetch();
  }

  // All of a stage that the kernel before does not write.
  __device__ __forceinline__ void begin_fetch() {
    if (place.image >= g.batch) return;
    const int first[3] = {tile.halo_first[0] + place.at[0], tile.halo_first[1] + place.at[1],
                          tile.halo_first[2] + place.at[2]};
    const unsigned to = address + stage * STAGE_BYTES;
    fetch_columns<HEAD_DIM>(to, columns_1, step_1, tile, first[0], first[1], first[2]);
    fetch_columns<VALUE_DIM>(to + COLUMNS_1_BYTES, columns_2, step_2, tile, first[0], first[1], first[2]);
    if (!place.is_first()) return;
    const unsigned at = address + rows_at(rows);
    fetch_row<HEAD_DIM>(at, row_1);
    fetch_row<VALUE_DIM>(at + ROWS_1_BYTES, row_2);
    if constexpr (!ROWS_ARE_KEYS) fetch_row<VALUE_DIM>(at + ROWS_1_BYTES + ROWS_2_BYTES, row_3);
  }

  __device__ __forceinline__ void end_fetch() {
    if (place.image < g.batch) {
      if constexpr (ROWS_ARE_KEYS) {
        const int first[3] = {tile.halo_first[0] + place.at[0], tile.halo_first[1] + place.at[1],
                              tile.halo_first[2] + place.at[2]};
        fetch_statistics(address + stage * STAGE_BYTES + COLUMNS_1_BYTES + COLUMNS_2_BYTES, first);
      }
      if (place.is_first()) rows = rows + 1 == STAGES ? 0 : rows + 1;
      advance();
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_commit();
  }

  // Bytes to this warp's rows in buffer `i`.
  static __device__ __forceinline__ unsigned rows_at(int i) { return ROWS_AT + (i * WARPS + threadIdx.x / 32) * ROWS_BYTES; }

 private:
  __device__ __forceinline__ void advance() {
    const Visit before = place;
    const int member = place.member;
    place.advance(tile, g);
    // Heads of q that share one of k and v follow each other.
    const long long heads = ROWS_ARE_KEYS ? place.member - member : 0;
    if (ROWS_ARE_KEYS && IS_GROUPED && heads != 0) {
      columns_1 += heads * columns_1_at.head;
      columns_2 += heads * columns_2_at.head;
      statistics += heads * tokens;
    }
    if ((RESIDENT && !IS_GROUPED) || place.image != before.image || (WALKS && place.walked != before.walked)) {
      columns_1 += Leap(tile, g, columns_1_at).to(place);
      columns_2 += Leap(tile, g, columns_2_at).to(place);
      row_1 += Leap(tile, g, rows_1_at).to(place);
      row_2 += Leap(tile, g, rows_2_at).to(place);
      if (!ROWS_ARE_KEYS) row_3 += Leap(tile, g, rows_3_at).to(place);
      const long long to_image = g.splits * (long long)(g.heads * heads_per_kv(g)) * tokens;
      statistics += Leap(tile, Leap::walk_tokens(g), to_image).to(place);
    }
  }

  // Where token i of a stage whose first position is `first` lies in an image.
  __device__ __forceinline__ int token_at(int i, const int (&first)[3]) const {
    const int in_chunk[3] = {i / (chunk(2) * chunk(1)), i / chunk(2) % chunk(1), i % chunk(2)};
    bool valid = i < CHUNK_TOKENS;
    int at = 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int position = first[axis] + in_chunk[axis];
      valid = valid && position < (axis == WALK ? tile.fetch_end(axis) : tile.length[axis]);
      at = at * g.length[axis] + position * g.dilation[axis] + tile.group[axis];
    }
    return valid ? at : -1;
  }

  // Zeros past the end of the group, where the start values are -inf.
  __device__ __forceinline__ void fetch_statistics(unsigned to, const int (&first)[3]) const {
#pragma unroll
    for (int i = 0; i < (CHUNK_TOKENS + THREADS - 1) / THREADS; ++i) {
      const int of_stage = threadIdx.x + i * THREADS;
      if (CHUNK_TOKENS % THREADS != 0 && of_stage >= CHUNK_TOKENS) break;
      const int at = token_at(of_stage, first);
      cp_async_8(to + of_stage * 8, statistics + at, at >= 0);
    }
  }
};

// Until the stage that comes next, at `stage_at` of shared memory, is there for all. A single stage is fetched here, where
// other blocks hide the wait; of more, one is fetched after this.
__device__ __forceinline__ void next_stage(Stream& stream, unsigned char* stage_at) {
  if (STAGES == 1) {
    __syncthreads();
    stream.fetch();
  }
  cp_async_wait<STAGES == 1 ? 0 : STAGES - 2>();
  round_columns<HEAD_DIM>(stage_at);
  round_columns<VALUE_DIM>(stage_at + COLUMNS_1_BYTES);
  // What this thread fetched is there; now what all fetched, and nobody reads the stage that is fetched next.
  __syncthreads();
}

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

// Calls visit(u, i) for the groups u = first + i that are computed at once.
template <class Visit>
__device__ __forceinline__ void for_each_at_once(int first, Visit visit) {
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i)
    if (first + i < GROUPS) visit(first + i, i);
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
