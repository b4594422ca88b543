// out[query] = sum over its keys of softmax(scale * q . k + rpb) * v, and lse, the log of the sum of exponentials.
//
// A block keeps one head, dilation group and tile (or walks over tiles that are alike) and goes over images; while it
// computes one stage of shared memory the next is fetched. Small windows: all scores of a tile are in registers at once.
// Large ones: the halo comes in chunks, and maximum and sum are carried from step to step (online softmax, arXiv
// 1805.02867).
#define NATRAIN_COLUMN_USES 1  // scores take columns of k, sums those of v
#include "exclusions.cuh"

using namespace natrain;

static_assert(ROWS == Side::QUERIES);

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
constexpr int K_BYTES = columns_bytes<HEAD_DIM>();
constexpr int V_BYTES = columns_bytes<VALUE_DIM>();
constexpr int Q_BYTES = 16 * RowFormat<HEAD_DIM>::PITCH, OUT_BYTES = 16 * RowFormat<VALUE_DIM>::PITCH;
constexpr int ROWS_BYTES = Q_BYTES > OUT_BYTES ? Q_BYTES : OUT_BYTES;
constexpr int COLUMN_BYTES = K_BYTES + V_BYTES;
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
  const Element *q, *k, *v;    // of the visit that comes next, at the first token of the dilation group
  const Step k_step, v_step;
  const Leap q_leap, k_leap, v_leap;
  const Offset q_row;          // of row lane % 16
  Visit visit;
  int z, y, x;                 // of the next chunk, in positions of the halo
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
        q_leap(t, g, args.q_at),
        k_leap(t, g, args.k_at),
        v_leap(t, g, args.v_at),
        q_row(row_offset(t, Step(g, args.q_at), threadIdx.x % 16)),
        visit(t),
        z(0),
        y(0),
        x(0),
        stage(0),
        rows(0) {}

  __device__ __forceinline__ void fetch() {
    if (visit.image < g.batch) {
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

  // Fetches again from the first chunk of `earlier` on, into the stage and the buffer of rows from which it is read.
  __device__ __forceinline__ void rewind(const Visit& earlier, int to_stage, int to_rows) {
    cp_async_wait<0>();
    __syncthreads();
    q -= q_leap.back(visit, earlier, tile, g.splits);
    k -= k_leap.back(visit, earlier, tile, g.splits);
    v -= v_leap.back(visit, earlier, tile, g.splits);
    visit = earlier, z = y = x = 0;
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
    visit.advance(tile, g);
    q += q_leap.to(visit);
    k += k_leap.to(visit);
    v += v_leap.to(visit);
  }
};

// Exponents of float32 and bfloat16 span 2^-126 .. 2^127: scores of a usual size need no maximum subtracted. float16 has
// too few; some score of the row is subtracted there, so that the largest exponential is 1 or a little more.
template <class T>
constexpr bool WIDE_RANGE = true;
template <>
constexpr bool WIDE_RANGE<float16> = false;

// Of the two rows of a lane: what is subtracted from scores (q . k + bias / scale), sum of exponentials, output.
struct State {
  float reference[2], out[VALUE_DIM / 8][4];
  RowSums<Element> sum;

  __device__ __forceinline__ void reset(float first_reference) {
    reference[0] = reference[1] = first_reference;
    sum.reset();
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 2; ++i) out[i / 4][i % 4] = 0;
  }
};

// Where a warp computes: bytes to the step's first line of k and v in shared memory, its first column there.
struct Place {
  unsigned k_line, v_line;
  int x;
};

// The scores of group u of a step.
__device__ __forceinline__ void score(const Shared& shared, const Rows<HEAD_DIM>& q, const Start& start,
                                      const Exclusions& exclusions, const Place& at, int u, float (&scores)[2][4]) {
  start.load(shared, u, scores);
  exclusions.exclude(u, scores);
  q.multiply(scores, score_columns<HEAD_DIM>(shared, at.k_line, at.x), group_bytes<HEAD_DIM>(u));
}

// At least the largest score so far, of row g + 8 * half.
__device__ __forceinline__ float largest_of(const float (&scores)[2][4], int half, float so_far) {
#pragma unroll
  for (int i = 0; i < 4; ++i) so_far = fmaxf(so_far, scores[i / 2][2 * half + i % 2]);
  so_far = fmaxf(so_far, __shfl_xor_sync(WARP, so_far, 1));
  return fmaxf(so_far, __shfl_xor_sync(WARP, so_far, 2));
}

// What a group adds, relative to the reference as it is.
__device__ __forceinline__ void add_group(const SumColumns<VALUE_DIM>& v, const Exclusions& exclusions, int u,
                                          float (&p)[2][4], float exponent, State& state) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& weight = p[i / 4][i % 4];
    // The product with the reference is rounded, not contracted: equal references must cancel (attend_carefully).
    weight = exp2_approx(fmaf(weight, exponent, __fmul_rn(-state.reference[i % 4 / 2], exponent)));
  }
  state.sum.add(p);
  exclusions.drop(u, p);
  v.add(state.out, p, group_bytes<VALUE_DIM>(u));
}

// A step relative to the reference as it is: no group waits for another.
__device__ __forceinline__ void attend(const Shared& shared, const Rows<HEAD_DIM>& q, const Start& start,
                                       const Exclusions& exclusions, const Place& at, float exponent, State& state) {
  const SumColumns<VALUE_DIM> v(shared, at.v_line, at.x);
#pragma unroll
  for (int u = 0; u < GROUPS; ++u) {
    if (start.is_empty(u)) continue;
    float p[2][4];
    score(shared, q, start, exclusions, at, u, p);
    add_group(v, exclusions, u, p, exponent, state);
  }
}

// A step with the running maximum as reference, for scores of any size.
__device__ __forceinline__ void attend_carefully(const Shared& shared, const Rows<HEAD_DIM>& q, const Start& start,
                                                 const Exclusions& exclusions, const Place& at, float exponent,
                                                 State& state) {
  const SumColumns<VALUE_DIM> v(shared, at.v_line, at.x);
#pragma unroll 1
  for (int u = 0; u < GROUPS; ++u) {
    if (start.is_empty(u)) continue;
    float p[2][4];
    score(shared, q, start, exclusions, at, u, p);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = state.reference[half], now = largest_of(p, half, before);
      const float factor = exp2_approx(__fmul_rn(before, exponent) - __fmul_rn(now, exponent));
      state.reference[half] = now;
      state.sum.scale(half, factor);
#pragma unroll
      for (int i = 0; i < VALUE_DIM / 4; ++i) state.out[i / 2][2 * half + i % 2] *= factor;
    }
    add_group(v, exclusions, u, p, exponent, state);
  }
}

// Whether the references served: every row's sum is far from the ends of the range, no exponential beyond it.
__device__ __forceinline__ bool is_in_range(const State& state) {
  const float low = fminf(state.sum.of(0), state.sum.of(1)), high = fmaxf(state.sum.of(0), state.sum.of(1));
  // A NaN fails too.
  return __all_sync(WARP, low > (WIDE_RANGE<Element> ? 1e-12f : 0.1f) && high < (WIDE_RANGE<Element> ? 1e12f : 1e6f) &&
                              low <= high);
}

extern "C" __global__ void __launch_bounds__(THREADS, NATRAIN_MIN_BLOCKS)
    natrain_fused_forward(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(bytes);
  const Shared shared{bytes, shared_address(bytes)};
  const Geometry& g = args.geometry;
  const Tile tile(g);
  const Scale scale(args.scale);
  constexpr unsigned TABLE_AT = STAGES * (COLUMN_BYTES + WARPS * ROWS_BYTES);
  Stream stream(args, tile, shared.address);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) stream.fetch();
  // The last stage is not fetched yet.
  if (HAS_RPB && START_TABLE && BIAS_BYTES <= COLUMN_BYTES) {
    float* const scratch = reinterpret_cast<float*>(bytes + (STAGES - 1) * COLUMN_BYTES);
    stage_bias(scratch, tile, args.rpb, scale.per_scale);
    StartTable::fill(bytes + TABLE_AT, tile, scratch, 1);
  } else {
    StartTable::fill(bytes + TABLE_AT, tile, bias_of_head(args.rpb, tile), scale.per_scale);
  }

  const LaneRows rows(tile);
#if NATRAIN_START_TABLE
  Start start(tile, TABLE_AT);
#else
  float* const staged = reinterpret_cast<float*>(bytes + TABLE_AT);
  if (StartTable::BYTES > 0) stage_bias(staged, tile, args.rpb, scale.per_scale);
  Start start(tile, StartTable::BYTES > 0 ? staged : bias_of_head(args.rpb, tile),
              StartTable::BYTES > 0 ? 1 : scale.per_scale);
#endif
  Exclusions exclusions(g, tile, rows, args.key_mask, args.seed, args.drop_threshold);
  const int lane = threadIdx.x % 32;
  const int token = tile.row_token(g, lane % 16);
  const unsigned stored_rows = __ballot_sync(WARP, tile.has_row(lane % 16)) & 0xffff;
  const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];
  // Of the next visit: the first row of this head, and this lane's row.
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
    const unsigned at = stage * COLUMN_BYTES;
    round_columns<HEAD_DIM>(bytes + at);
    round_columns<VALUE_DIM>(bytes + at + K_BYTES);
    __syncthreads();
    if (STAGES > 1) stream.fetch();
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

  for (Visit visit(tile); visit.image < g.batch;
       visit.advance(tile, g), q_buffer = q_buffer + 1 == STAGES ? 0 : q_buffer + 1) {
    const unsigned rows_at = Stream::rows_at(q_buffer);
    exclusions.to_image(visit.image, tokens);
    Element* const out = next_out;
    float* const lse_of_row = next_lse;
    Visit next = visit;
    next.advance(tile, g);
    // A Leap for each: one that both share takes registers that NAT-Tiny's second layer lacks.
    next_out += Leap(tile, Leap::walk_tokens(g), g.splits * tokens).to(next) * g.heads * VALUE_DIM;
    next_lse += Leap(tile, Leap::walk_tokens(g), g.splits * tokens).to(next) * g.heads;
    if (RESIDENT) {
      const unsigned columns = next_stage();
      if (!tile.is_active) continue;
      q.load(shared, rows_at, scale.flip);
      const Place at = place_of(columns, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
      state.reset(WIDE_RANGE<Element> ? 0 : LOWEST);
      if (!WIDE_RANGE<Element>) {
        // The middle of a box is in all its rows' windows.
        float p[2][4];
        score(shared, q, start, exclusions, at, GROUPS / 2, p);
        state.reference[0] = largest_of(p, 0, LOWEST);
        state.reference[1] = largest_of(p, 1, LOWEST);
      }
      attend(shared, q, start, exclusions, at, scale.exponent, state);
      if (!is_in_range(state)) {
        state.reset(LOWEST);
        attend_carefully(shared, q, start, exclusions, at, scale.exponent, state);
      }
    } else {
      // Every chunk of the halo; again, with care, where the references did not serve.
#pragma unroll 1
      for (bool is_careful = false;; is_careful = true) {
        bool is_first = true;
        state.reset(is_careful || !WIDE_RANGE<Element> ? LOWEST : 0);
        for (int z0 = 0; tile.halo_first[0] + z0 < tile.halo_end[0]; z0 += chunk(0))
          for (int y0 = 0; tile.halo_first[1] + y0 < tile.halo_end[1]; y0 += chunk(1))
            for (int x0 = 0; tile.halo_first[2] + x0 < tile.halo_end[2]; x0 += chunk(2)) {
              const unsigned columns = next_stage();
              if (is_first) q.load(shared, rows_at, scale.flip);
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
                  // Without a wide range until every row has met a score.
                  if (is_careful || (!WIDE_RANGE<Element> &&
                                     __any_sync(WARP, fminf(state.reference[0], state.reference[1]) == LOWEST))) {
                    attend_carefully(shared, q, start, exclusions, at, scale.exponent, state);
                  } else {
                    attend(shared, q, start, exclusions, at, scale.exponent, state);
                  }
                }
              }
            }
        if (is_careful || !__syncthreads_or(tile.is_active && !is_in_range(state))) break;
        stream.rewind(visit, stage, q_buffer);
      }
      if (!tile.is_active) continue;
    }

    float factor[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = state.sum.of(half);
      factor[half] = sum == 0 ? 0 : __fdividef(NATRAIN_HAS_DROPOUT ? args.keep_scale : 1.f, sum);
      lse[half] = LN_2 * (state.reference[half] * scale.exponent + log2_approx(sum));
    }
    if (args.lse) {
      // To lane r from the quad of row r.
      const float low = __shfl_sync(WARP, lse[0], lane % 8 * 4), high = __shfl_sync(WARP, lse[1], lane % 8 * 4);
      if (lane < 16 && (stored_rows >> lane & 1)) *lse_of_row = lane < 8 ? low : high;
    }
    // Queries and outputs share their rows.
    __syncwarp();
    put_rows<VALUE_DIM>(shared, rows_at, state.out, factor);
    __syncwarp();
    store_rows<VALUE_DIM>(bytes + rows_at, out, out_row, stored_rows);
  }
}
