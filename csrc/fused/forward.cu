// out[query] = sum over its keys of softmax(scale * q . k + rpb) * v, and lse, the log of the sum of exponentials.
//
// A block keeps one head, dilation group and tile and goes over images; while it computes one stage of shared memory the
// next is fetched. Small windows: all scores of a tile are in registers at once. Large ones: the halo comes in chunks, and
// maximum and sum are carried from step to step (online softmax, arXiv 1805.02867).
#include "exclusions.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;
  float scale;               // of q . k
  float keep_scale;          // 1 / (1 - dropout_p)
  unsigned drop_threshold;
  const Element *q, *k, *v;
  Element* out;              // [B, Z, Y, X, N, VALUE_DIM] without gaps
  float* lse;                // [B, Z, Y, X, N], or null
  const float* rpb;          // [N, 2kz-1, 2ky-1, 2kx-1], read when NATRAIN_HAS_RPB
  const unsigned char* key_mask;  // [B, Z, Y, X], not 0: may be attended; read when NATRAIN_HAS_KEY_MASK
  const long long* seed;     // read when NATRAIN_HAS_DROPOUT
  Layout q_at, k_at, v_at;
};

constexpr int STAGES = NATRAIN_STAGES;
// A stage: columns of k, columns of v, each warp's rows of q, in whose place its output goes.
constexpr int K_BYTES = CHUNK_TOKENS * RowFormat<HEAD_DIM>::PITCH;
constexpr int V_BYTES = CHUNK_TOKENS * RowFormat<VALUE_DIM>::PITCH;
constexpr int Q_BYTES = 16 * RowFormat<HEAD_DIM>::PITCH, OUT_BYTES = 16 * RowFormat<VALUE_DIM>::PITCH;
constexpr int ROWS_BYTES = Q_BYTES > OUT_BYTES ? Q_BYTES : OUT_BYTES;
constexpr int COLUMN_BYTES = (K_BYTES + V_BYTES + 127) / 128 * 128;
constexpr int SHARED_BYTES = STAGES * (COLUMN_BYTES + WARPS * ROWS_BYTES) + StartTable::BYTES;
static_assert(SHARED_BYTES <= NATRAIN_SHARED_BYTES);

// Below any score; finite, so that a row without keys subtracts no infinities.
constexpr float LOWEST = -1e30f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(WARP, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(WARP, x, 1);
  return x + __shfl_xor_sync(WARP, x, 2);
}

// The stages of shared memory, fetched ahead of use: chunk by chunk, image by image.
class Stream {
  const Arguments& args;
  const Tile& tile;
  const unsigned address;
  const Step k_step, v_step;
  const long long q_origin, k_origin, v_origin;
  const Offset q_row;  // of row lane % 16
  int image, z, y, x;  // of the next chunk, in positions of the halo
  int stage, rows;     // where it goes

 public:
  __device__ __forceinline__ Stream(const Arguments& arguments, const Tile& t, unsigned shared_address)
      : args(arguments),
        tile(t),
        address(shared_address),
        k_step(args.geometry, args.k_at),
        v_step(args.geometry, args.v_at),
        q_origin(tile.group_origin(args.q_at, tile.head)),
        k_origin(tile.group_origin(args.k_at, tile.head / args.geometry.heads_per_kv)),
        v_origin(tile.group_origin(args.v_at, tile.head / args.geometry.heads_per_kv)),
        q_row(row_offset(tile, Step(args.geometry, args.q_at), threadIdx.x % 16)),
        image(tile.first_image),
        z(0),
        y(0),
        x(0),
        stage(0),
        rows(0) {}

  __device__ __forceinline__ void fetch() {
    if (image < args.geometry.batch) {
      const unsigned to = address + stage * COLUMN_BYTES;
      const int z_first = tile.halo_first[0] + z, y_first = tile.halo_first[1] + y, x_first = tile.halo_first[2] + x;
      fetch_columns<HEAD_DIM>(to, args.k + image * args.k_at.batch + k_origin, k_step, tile, z_first, y_first, x_first);
      fetch_columns<VALUE_DIM>(to + K_BYTES, args.v + image * args.v_at.batch + v_origin, v_step, tile, z_first, y_first,
                               x_first);
      if (RESIDENT || (z == 0 && y == 0 && x == 0)) {
        fetch_rows<HEAD_DIM>(address + rows_at(rows), args.q + image * args.q_at.batch + q_origin, q_row);
        rows = rows + 1 == STAGES ? 0 : rows + 1;
      }
      advance();
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_commit();
  }

  // Bytes to this warp's rows of q in buffer `i`.
  static __device__ __forceinline__ unsigned rows_at(int i) {
    return STAGES * COLUMN_BYTES + (i * WARPS + threadIdx.x / 32) * ROWS_BYTES;
  }

 private:
  __device__ __forceinline__ void advance() {
    if (!RESIDENT) {
      if (tile.halo_first[2] + (x += chunk(2)) < tile.halo_end[2]) return;
      x = 0;
      if (tile.halo_first[1] + (y += chunk(1)) < tile.halo_end[1]) return;
      y = 0;
      if (tile.halo_first[0] + (z += chunk(0)) < tile.halo_end[0]) return;
      z = 0;
    }
    image += args.geometry.splits;
  }
};

// Of the two rows of a lane: running maximum (of q . k + bias / scale), sum of exponentials (of this lane's columns), output.
struct State {
  float largest[2], sum[2], out[VALUE_DIM / 8][4];

  __device__ __forceinline__ void reset() {
    largest[0] = largest[1] = LOWEST;
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 2; ++i) out[i / 4][i % 4] = 0;
  }
};

// One step: its scores, their exponentials, and what these add to `state`. `k_line`, `v_line`: bytes to the step's first
// line in shared memory, `x` its first column there.
__device__ __forceinline__ void attend(const Shared& shared, const Rows<HEAD_DIM>& q, const Start& start,
                                       const Exclusions& exclusions, unsigned k_line, unsigned v_line, int x,
                                       float exponent, State& state) {
  float p[GROUPS][2][4];
  const unsigned k_columns = score_columns<HEAD_DIM>(shared, k_line, x);
#pragma unroll
  for (int u = 0; u < GROUPS; ++u) {
    if (start.is_empty(u)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) p[u][i / 4][i % 4] = MINUS_INFINITY;
      continue;
    }
    start.load(shared, u, p[u]);
    exclusions.exclude(u, p[u]);
    q.multiply(p[u], k_columns + group_bytes<HEAD_DIM>(u));
  }

  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = RESIDENT ? LOWEST : state.largest[half];
#pragma unroll
    for (int u = 0; u < GROUPS; ++u)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = fmaxf(largest, p[u][i / 2][2 * half + i % 2]);
    largest = quad_max(largest);
    // Rounded, not contracted: equal maxima must give a difference of exactly zero.
    shift[half] = __fmul_rn(-largest, exponent);
    if (!RESIDENT) {
      const float factor = exp2_approx(shift[half] - __fmul_rn(-state.largest[half], exponent));
      state.sum[half] *= factor;
#pragma unroll
      for (int i = 0; i < VALUE_DIM / 4; ++i) state.out[i / 2][2 * half + i % 2] *= factor;
    }
    state.largest[half] = largest;
  }

  const SumColumns<VALUE_DIM> v(shared, v_line, x);
#pragma unroll
  for (int u = 0; u < GROUPS; ++u) {
    if (start.is_empty(u)) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 4 / 2;
      float& weight = p[u][i / 4][i % 4];
      weight = exp2_approx(fmaf(weight, exponent, shift[half]));
      state.sum[half] += weight;
    }
    exclusions.drop(u, p[u]);
    v.add(state.out, p[u], group_bytes<VALUE_DIM>(u));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, NATRAIN_MIN_BLOCKS)
    natrain_fused_forward(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(bytes);
  const Shared shared{bytes, shared_address(bytes)};
  const Geometry& g = args.geometry;
  const Tile tile(g);
  const Scale scale(args.scale);
  constexpr unsigned TABLE_AT = STAGES * (COLUMN_BYTES + WARPS * ROWS_BYTES);
  StartTable::fill(bytes + TABLE_AT, tile, args.rpb, scale.per_scale);

  Stream stream(args, tile, shared.address);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) stream.fetch();

  const LaneRows rows(tile);
#if NATRAIN_START_TABLE
  Start start(tile, TABLE_AT);
#else
  Start start(tile, args.rpb, scale.per_scale);
#endif
  Exclusions exclusions(g, tile, rows, args.key_mask, args.seed, args.drop_threshold);
  const int lane = threadIdx.x % 32;
  const int token = tile.row_token(g, lane % 16);
  const unsigned stored_rows = __ballot_sync(WARP, tile.has_row(lane % 16)) & 0xffff;
  const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];

  Rows<HEAD_DIM> q;
  State state;
  int stage = 0, q_buffer = 0;
  // The stage that comes next; what this thread fetched of it is there, then what all fetched, and nobody reads the one
  // that is fetched now.
  const auto next_stage = [&] {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    stream.fetch();
    const unsigned at = stage * COLUMN_BYTES;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    return at;
  };
  // The step at z, y, x of the chunk at `columns` in shared memory.
  const auto take_step = [&](unsigned columns, int z, int y, int x) {
    const unsigned line = (z * chunk(1) + y) * chunk(2);
    attend(shared, q, start, exclusions, columns + line * RowFormat<HEAD_DIM>::PITCH,
           columns + K_BYTES + line * RowFormat<VALUE_DIM>::PITCH, x, scale.exponent, state);
  };
  if (RESIDENT) {
    start.to_step(rows, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
    exclusions.to_step(tile.box_first[0], tile.box_first[1], tile.box_first[2]);
  }

  for (int image = tile.first_image; image < g.batch; image += g.splits) {
    const unsigned rows_at = Stream::rows_at(q_buffer);
    q_buffer = q_buffer + 1 == STAGES ? 0 : q_buffer + 1;
    state.reset();
    exclusions.to_image(image, tokens);
    if (RESIDENT) {
      const unsigned columns = next_stage();
      if (!tile.is_active) continue;
      q.load(shared, rows_at, scale.keep, scale.flip);
      take_step(columns, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
    } else {
      bool is_first = true;
      for (int z0 = 0; tile.halo_first[0] + z0 < tile.halo_end[0]; z0 += chunk(0))
        for (int y0 = 0; tile.halo_first[1] + y0 < tile.halo_end[1]; y0 += chunk(1))
          for (int x0 = 0; tile.halo_first[2] + x0 < tile.halo_end[2]; x0 += chunk(2)) {
            const unsigned columns = next_stage();
            if (is_first) q.load(shared, rows_at, scale.keep, scale.flip);
            is_first = false;
            if (!tile.is_active) continue;
            if (CHUNKED_X && (x0 + chunk(2) <= tile.box_first[2] || x0 >= tile.box_end[2])) continue;
            // Only steps that the warp's box meets.
            for (int z = 0; z < chunk(0); z += step(0)) {
              if (z0 + z + step(0) <= tile.box_first[0] || z0 + z >= tile.box_end[0]) continue;
              for (int y = 0; y < chunk(1); y += step(1)) {
                if (y0 + y + step(1) <= tile.box_first[1] || y0 + y >= tile.box_end[1]) continue;
                const int x = CHUNKED_X ? 0 : tile.box_first[2];
                start.to_step(rows, z0 + z, y0 + y, x0 + x);
                exclusions.to_step(z0 + z, y0 + y, x0 + x);
                take_step(columns, z, y, x);
              }
            }
          }
      if (!tile.is_active) continue;
    }

    float factor[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(state.sum[half]);
      factor[half] = sum == 0 ? 0 : (NATRAIN_HAS_DROPOUT ? args.keep_scale : 1.f) / sum;
      lse[half] = LN_2 * (state.largest[half] * scale.exponent + log2_approx(sum));
    }
    const long long first = image * tokens * g.heads + tile.head;
    if (args.lse) {
      // To lane r from the quad of row r.
      const float low = __shfl_sync(WARP, lse[0], lane % 8 * 4), high = __shfl_sync(WARP, lse[1], lane % 8 * 4);
      if (lane < 16 && (stored_rows >> lane & 1)) args.lse[first + (long long)token * g.heads] = lane < 8 ? low : high;
    }
    put_rows<VALUE_DIM>(shared, rows_at, state.out, factor);
    __syncwarp();
    store_rows<VALUE_DIM>(bytes + rows_at, args.out + first * VALUE_DIM, Offset(token) * g.heads * VALUE_DIM, stored_rows);
  }
}
