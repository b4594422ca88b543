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
// The stages of shared memory, fetched ahead of use: chunk by chunk, image by image.
class Stream {
  const Geometry& g;
  const Tile& tile;
  const unsigned address;
  const Element *q, *k, *v;    // of the image that comes next, at the first token of the dilation group
  const Step k_step, v_step;
  const long long q_image, k_image, v_image;  // elements from an image to the next
  const Offset q_row;          // of row lane % 16
  int image, z, y, x;          // of the next chunk, in positions of the halo
  int stage, rows;             // where it goes

 public:
  __device__ __forceinline__ Stream(const Arguments& args, const Tile& t, unsigned shared_address)
      : g(args.geometry),
        tile(t),
        address(shared_address),
        q(args.q + t.group_origin(args.q_at, t.head) + t.first_image * args.q_at.batch),
        k(args.k + t.group_origin(args.k_at, t.head / g.heads_per_kv) + t.first_image * args.k_at.batch),
        v(args.v + t.group_origin(args.v_at, t.head / g.heads_per_kv) + t.first_image * args.v_at.batch),
        k_step(g, args.k_at),
        v_step(g, args.v_at),
        q_image(args.q_at.batch * g.splits),
        k_image(args.k_at.batch * g.splits),
        v_image(args.v_at.batch * g.splits),
        q_row(row_offset(t, Step(g, args.q_at), threadIdx.x % 16)),
        image(t.first_image),
        z(0),
        y(0),
        x(0),
        stage(0),
        rows(0) {}

  __device__ __forceinline__ void fetch() {
    if (image < g.batch) {
      const unsigned to = address + stage * COLUMN_BYTES;
      const int z_first = tile.halo_first[0] + z, y_first = tile.halo_first[1] + y, x_first = tile.halo_first[2] + x;
      fetch_columns<HEAD_DIM>(to, k, k_step, tile, z_first, y_first, x_first);
      fetch_columns<VALUE_DIM>(to + K_BYTES, v, v_step, tile, z_first, y_first, x_first);
      if (RESIDENT || (z == 0 && y == 0 && x == 0)) {
        fetch_rows<HEAD_DIM>(address + rows_at(rows), q, q_row);
        rows = rows + 1 == STAGES ? 0 : rows + 1;
      }
      advance();
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_commit();
  }

  // Fetches again from the first chunk of `at_image` on, into the stage and the buffer of rows from which it is read.
  __device__ __forceinline__ void rewind(int at_image, int to_stage, int to_rows) {
    cp_async_wait<0>();
    __syncthreads();
    const int images = (image - at_image) / g.splits;
    q -= images * q_image, k -= images * k_image, v -= images * v_image;
    image = at_image, z = y = x = 0;
    stage = to_stage, rows = to_rows;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) fetch();
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
    image += g.splits;
    q += q_image;
    k += k_image;
    v += v_image;
  }
};

// Exponents of float32 and bfloat16 span 2^-126 .. 2^127: scores of a usual size need no maximum subtracted. float16 has
// too few.
template <class T>
constexpr bool WIDE_RANGE = true;
template <>
constexpr bool WIDE_RANGE<float16> = false;
constexpr bool UNSHIFTED = WIDE_RANGE<Element>;

// With a maximum: all groups of a step at once where that is the rule, one where it is the exception.
constexpr int SHIFTED_GROUPS = UNSHIFTED ? 1 : GROUPS;

// Of the two rows of a lane: running maximum (of q . k + bias / scale), sum of exponentials, output.
struct State {
  float largest[2], out[VALUE_DIM / 8][4];
  RowSums<Element> sum;
#ifdef EXPERIMENT_LSE
  float exact[2];
#endif

  __device__ __forceinline__ void reset() {
    largest[0] = largest[1] = LOWEST;
    sum.reset();
#ifdef EXPERIMENT_LSE
    exact[0] = exact[1] = 0;
#endif
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 2; ++i) out[i / 4][i % 4] = 0;
  }
};

// Where a warp computes: bytes to the step's first line of k and v in shared memory, its first column there.
struct Place {
  unsigned k_line, v_line;
  int x;
};

// Groups `first` .. + COUNT of a step: their scores, their exponentials, and what these add to `state`. ONLINE: what is in
// `state` already is scaled to the new maximum.
template <int COUNT, bool ONLINE>
__device__ __forceinline__ void attend(const Shared& shared, const Rows<HEAD_DIM>& q, const Start& start,
                                       const Exclusions& exclusions, const Place& at, int first, float exponent,
                                       State& state) {
  float p[COUNT][2][4];
  const unsigned k_columns = score_columns<HEAD_DIM>(shared, at.k_line, at.x);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int u = first + i;
    if (start.is_empty(u)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) p[i][j / 4][j % 4] = MINUS_INFINITY;
      continue;
    }
    start.load(shared, u, p[i]);
    exclusions.exclude(u, p[i]);
    q.multiply(p[i], k_columns, group_bytes<HEAD_DIM>(u));
  }

  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = ONLINE ? state.largest[half] : LOWEST;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = fmaxf(largest, p[i][j / 2][2 * half + j % 2]);
    largest = quad_max(largest);
    // Rounded, not contracted: equal maxima must give a difference of exactly zero.
    shift[half] = __fmul_rn(-largest, exponent);
    if (ONLINE) {
      const float factor = exp2_approx(shift[half] - __fmul_rn(-state.largest[half], exponent));
      state.sum.scale(half, factor);
#pragma unroll
      for (int i = 0; i < VALUE_DIM / 4; ++i) state.out[i / 2][2 * half + i % 2] *= factor;
    }
    state.largest[half] = largest;
  }

  const SumColumns<VALUE_DIM> v(shared, at.v_line, at.x);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int u = first + i;
    if (start.is_empty(u)) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& weight = p[i][j / 4][j % 4];
      weight = exp2_approx(fmaf(weight, exponent, shift[j % 4 / 2]));
    }
    state.sum.add(p[i]);
    exclusions.drop(u, p[i]);
    v.add(state.out, p[i], group_bytes<VALUE_DIM>(u));
  }
}

// A whole step without a maximum: exponentials of scores as they are, so that no group waits for another.
__device__ __forceinline__ void attend_unshifted(const Shared& shared, const Rows<HEAD_DIM>& q, const Start& start,
                                                 const Exclusions& exclusions, const Place& at, float exponent,
                                                 State& state) {
  const unsigned k_columns = score_columns<HEAD_DIM>(shared, at.k_line, at.x);
  const SumColumns<VALUE_DIM> v(shared, at.v_line, at.x);
#pragma unroll
  for (int u = 0; u < GROUPS; ++u) {
    if (start.is_empty(u)) continue;
    float p[2][4];
    start.load(shared, u, p);
    exclusions.exclude(u, p);
    q.multiply(p, k_columns, group_bytes<HEAD_DIM>(u));
#pragma unroll
    for (int j = 0; j < 8; ++j) p[j / 4][j % 4] = exp2_approx(p[j / 4][j % 4] * exponent);
    state.sum.add(p);
#ifdef EXPERIMENT_LSE
    for (int j = 0; j < 8; ++j) state.exact[j % 4 / 2] += p[j / 4][j % 4];
#endif
    exclusions.drop(u, p);
    v.add(state.out, p, group_bytes<VALUE_DIM>(u));
  }
}

// Whether that lost nothing: every row's sum is far from the ends of the range.
__device__ __forceinline__ bool is_in_range(const State& state) {
  const float low = fminf(state.sum.of(0), state.sum.of(1)), high = fmaxf(state.sum.of(0), state.sum.of(1));
  // Not a number fails too.
  return __all_sync(WARP, low > 1e-12f && high < 1e12f && low <= high);
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
  // Of the next image: the first row of this head, and this lane's row.
  Element* next_out = args.out + (tile.first_image * tokens * g.heads + tile.head) * VALUE_DIM;
  float* next_lse = args.lse + (tile.first_image * tokens + token) * g.heads + tile.head;
  const Offset out_row = Offset(token) * g.heads * VALUE_DIM;

  Rows<HEAD_DIM> q;
  State state;
  int stage = 0, q_buffer = 0;
  // The stage that comes next; what this thread fetched of it is there, then what all fetched, and nobody reads the one
  // that is fetched now.
  const auto next_stage = [&] {
    if (STAGES == 1) {
      __syncthreads();
      stream.fetch();
    }
    cp_async_wait<STAGES == 1 ? 0 : STAGES - 2>();
    __syncthreads();
    if (STAGES > 1) stream.fetch();
    const unsigned at = stage * COLUMN_BYTES;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    return at;
  };
  // The step at z, y, x of the chunk at `columns` in shared memory.
  const auto place_of = [&](unsigned columns, int z, int y, int x) {
    const unsigned line = (z * chunk(1) + y) * chunk(2);
    return Place{columns + line * RowFormat<HEAD_DIM>::PITCH, columns + K_BYTES + line * RowFormat<VALUE_DIM>::PITCH, x};
  };
  if (RESIDENT) {
    start.to_step(rows, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
    exclusions.to_step(tile.box_first[0], tile.box_first[1], tile.box_first[2]);
  }

  for (int image = tile.first_image; image < g.batch;
       image += g.splits, q_buffer = q_buffer + 1 == STAGES ? 0 : q_buffer + 1) {
    const unsigned rows_at = Stream::rows_at(q_buffer);
    state.reset();
    exclusions.to_image(image, tokens);
    Element* const out = next_out;
    float* const lse_of_row = next_lse;
    next_out += g.splits * tokens * g.heads * VALUE_DIM;
    next_lse += g.splits * tokens * g.heads;
    if (RESIDENT) {
      const unsigned columns = next_stage();
      if (!tile.is_active) continue;
      q.load(shared, rows_at, scale.keep, scale.flip);
      const Place at = place_of(columns, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
      if (UNSHIFTED) {
        state.largest[0] = state.largest[1] = 0;
        attend_unshifted(shared, q, start, exclusions, at, scale.exponent, state);
        if (!is_in_range(state)) {
          state.reset();
#pragma unroll 1
          for (int u = 0; u < GROUPS; ++u)
            attend<1, true>(shared, q, start, exclusions, at, u, scale.exponent, state);
        }
      } else {
        attend<GROUPS, false>(shared, q, start, exclusions, at, 0, scale.exponent, state);
      }
    } else {
      // Every chunk of the halo; again, with a running maximum, where scores are too large or too small for none.
#pragma unroll 1
      for (bool is_shifted = !UNSHIFTED;; is_shifted = true) {
        bool is_first = true;
        state.reset();
        if (!is_shifted) state.largest[0] = state.largest[1] = 0;
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
                  const Place at = place_of(columns, z, y, x);
                  if (is_shifted) {
#pragma unroll 1
                    for (int u = 0; u < GROUPS; u += SHIFTED_GROUPS)
                      attend<SHIFTED_GROUPS, true>(shared, q, start, exclusions, at, u, scale.exponent, state);
                  } else {
                    attend_unshifted(shared, q, start, exclusions, at, scale.exponent, state);
                  }
                }
              }
            }
        if (is_shifted || !__syncthreads_or(tile.is_active && !is_in_range(state))) break;
        stream.rewind(image, stage, q_buffer);
      }
      if (!tile.is_active) continue;
    }

    float factor[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = state.sum.of(half);
      factor[half] = sum == 0 ? 0 : __fdividef(NATRAIN_HAS_DROPOUT ? args.keep_scale : 1.f, sum);
      lse[half] = LN_2 * (state.largest[half] * scale.exponent + log2_approx(
#ifdef EXPERIMENT_LSE
      state.exact[half] + __shfl_xor_sync(WARP, state.exact[half], 1)
#else
      sum
#endif
      ));
    }
    if (args.lse) {
      // To lane r from the quad of row r.
      const float low = __shfl_sync(WARP, lse[0], lane % 8 * 4), high = __shfl_sync(WARP, lse[1], lane % 8 * 4);
      if (lane < 16 && (stored_rows >> lane & 1)) *lse_of_row = lane < 8 ? low : high;
    }
    put_rows<VALUE_DIM>(shared, rows_at, state.out, factor);
    __syncwarp();
    store_rows<VALUE_DIM>(bytes + rows_at, out, out_row, stored_rows);
  }
}
