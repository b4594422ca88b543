// dQ, dK and dV of a tile of tokens in one pass: for windows so short that one halo of q, k, v, d_out and out fits shared
// memory as a whole. Each is read once (and what neighbouring tiles share a second time, from the second-level cache),
// where backward_q.cu and backward_kv.cu read twelve tensors between them.
//
// A warp's rows are queries first, then keys; either way they lie in the halo themselves. Any halo has all that a query's
// statistics need, so that every block computes those of its own columns and nothing is exchanged.
#include "backward.cuh"

using namespace natrain;

static_assert(ROWS == Side::BOTH && RESIDENT && GROUPS <= 32 && !IS_GROUPED && !HAS_DROPOUT && !HAS_KEY_MASK);
// Of a line: pairs of lines, as boxes of planes have them, take a table of start values.
static_assert(box(0) * box(1) == 1);

// A stage: the halo of every tensor, and two numbers a query (first lse, then lse in powers of two and delta). Once these
// are known, gradients leave through what held `out`, every warp's through a place of its own.
constexpr int WIDEST = HEAD_DIM > VALUE_DIM ? HEAD_DIM : VALUE_DIM;
constexpr int GRADIENT_BYTES = 16 * RowFormat<WIDEST>::PITCH;
constexpr int Q_AT = 0;
constexpr int K_AT = Q_AT + columns_bytes<HEAD_DIM>();
constexpr int V_AT = K_AT + columns_bytes<HEAD_DIM>();
constexpr int D_OUT_AT = V_AT + columns_bytes<VALUE_DIM>();
constexpr int OUT_AT = D_OUT_AT + columns_bytes<VALUE_DIM>();
constexpr int STATISTICS_AT = OUT_AT + columns_bytes<WIDEST>();
constexpr int STAGE_BYTES = (STATISTICS_AT + CHUNK_TOKENS * 8 + 127) / 128 * 128;
static_assert(WARPS * GRADIENT_BYTES <= columns_bytes<WIDEST>());
static_assert(STAGES * STAGE_BYTES <= NATRAIN_SHARED_BYTES);

// Rows are held in registers where those of the sums leave room for them.
constexpr bool HAS_ROOM = (HEAD_DIM + VALUE_DIM) * int(sizeof(Element) + 4) <= 1024;

// Offsets of what a thread fetches are reckoned for every image: kept, those of five tensors fill the registers.
template <int DIM>
__device__ __forceinline__ void fetch_halo(unsigned to, const Geometry& g, const Tile& tile, const Element* data,
                                           const Layout& at, const Visit& visit) {
  unsigned first[3] = {unsigned(tile.halo_first[0]), unsigned(tile.halo_first[1]), unsigned(tile.halo_first[2])};
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) hide(first[axis]);
  fetch_columns<DIM>(to, origin_of(tile, g, data, at, visit), Step(g, at), tile, int(first[0]), int(first[1]), int(first[2]));
}

// A tile of sums times `factor` to this lane's row of a gradient, by way of this warp's `place` in shared memory.
template <int DIM>
__device__ __forceinline__ void put(const Shared& shared, unsigned place, const float (&sums)[DIM / 8][4], float factor,
                                    Element* row, bool has_row) {
  const float factors[2] = {factor, factor};
  __syncwarp();
  put_rows<DIM>(shared, place, sums, factors);
  __syncwarp();
  if (has_row) store_row<DIM>(shared.bytes + place, row);
}

// Which of a lane's scores are pairs of the window, a bit each: the same for every image.
class Pairs {
  unsigned bits[(GROUPS + 3) / 4];
  unsigned any, all;  // groups with a pair, and with nothing else: equal in a warp
  // Windows shorter than that have no group with nothing else.
  static constexpr bool MAY_HAVE_ALL = kernel_size(2) >= 16 + row_tile(2) - 1;

 public:
  __device__ __forceinline__ Pairs(const Tile& tile, Side side) : any(0), all(0) {
    Start start(tile, nullptr, 1.f, side);
    start.to_step(LaneRows(tile, side), tile.box_first[0], tile.box_first[1], tile.box_first[2]);
    const Shared none{};
#pragma unroll
    for (int u = 0; u < GROUPS; ++u) {
      float values[2][4];
      start.load(none, u, values);
      unsigned of_group = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) of_group |= unsigned(values[i / 4][i % 4] == 0) << i;
      bits[u / 4] = (u % 4 == 0 ? 0 : bits[u / 4]) | of_group << u % 4 * 8;
      any |= (__any_sync(WARP, of_group != 0) ? 1u : 0u) << u;
      all |= (__all_sync(WARP, of_group == 0xff) ? 1u : 0u) << u;
    }
  }

  __device__ __forceinline__ bool is_empty(int u) const { return !(any >> u & 1); }
  // Values that scores start from: 0, or -inf where there is no pair.
  __device__ __forceinline__ void load(int u, float (&start)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) start[i / 4][i % 4] = 0;
    if (MAY_HAVE_ALL && all >> u & 1) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool is_pair = bits[u / 4] >> (u % 4 * 8 + i) & 1;
      // The same twice: as an assignment it takes 20 registers less, which is best where those are few, else 15 % slower.
      if constexpr (sizeof(Element) == 4 || HEAD_DIM + VALUE_DIM <= 64) {
        start[i / 4][i % 4] = is_pair ? 0.f : MINUS_INFINITY;
      } else if (!is_pair) {
        start[i / 4][i % 4] = MINUS_INFINITY;
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, NATRAIN_MIN_BLOCKS)
    natrain_fused_backward_qkv(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(bytes);
  const Shared shared{bytes, shared_address(bytes)};
  const Geometry& g = args.geometry;
  const Tile tile(g);
  const Scale scale(args.scale);
  const int lane = threadIdx.x % 32;
  const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];

  // What token_at counts from.
  const auto first_token = [&](const Visit& at) { return at.image * tokens + at.walked * Leap::walk_tokens(g); };
  // Where position i of the halo lies in an image, -1 past the end of the dilation group.
  const auto token_at = [&](int i) {
    const int at[3] = {i / (chunk(2) * chunk(1)), i / chunk(2) % chunk(1), i % chunk(2)};
    bool valid = i < CHUNK_TOKENS;
    int token = 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int position = tile.halo_first[axis] + at[axis];
      valid = valid && position < (axis == WALK ? tile.fetch_end(axis) : tile.length[axis]);
      token = token * g.length[axis] + position * g.dilation[axis] + tile.group[axis];
    }
    return valid ? token : -1;
  };
  Visit next(tile);
  int next_stage = 0;
  const auto fetch = [&] {
    if (next.image < g.batch) {
      const unsigned to = shared.address + next_stage * STAGE_BYTES;
      fetch_halo<VALUE_DIM>(to + D_OUT_AT, g, tile, args.d_out, args.d_out_at, next);
      fetch_halo<VALUE_DIM>(to + OUT_AT, g, tile, args.out, args.out_at, next);
      const float* const lse = args.lse + first_token(next) * g.heads + tile.head;
#pragma unroll
      for (int first = 0; first < CHUNK_TOKENS; first += THREADS) {
        unsigned i = first + threadIdx.x;
        hide(i);
        const int token = token_at(i);
        if (i < CHUNK_TOKENS)
          cp_async_4(to + STATISTICS_AT + i * 8, lse + (long long)max(token, 0) * g.heads, token >= 0);
      }
      fetch_halo<HEAD_DIM>(to + Q_AT, g, tile, args.q, args.q_at, next);
      fetch_halo<HEAD_DIM>(to + K_AT, g, tile, args.k, args.k_at, next);
      fetch_halo<VALUE_DIM>(to + V_AT, g, tile, args.v, args.v_at, next);
      next.advance(tile, g);
      next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch();

  // The first column of the warp's box, and its rows, as places in the halo.
  const int z = tile.box_first[0], y = tile.box_first[1], x = tile.box_first[2];
  const unsigned line = (z * chunk(1) + y) * chunk(2);
  const auto line_of_row = [&](int r) {
    return unsigned(((tile.row(0, r) - tile.halo_first[0]) * chunk(1) + tile.row(1, r) - tile.halo_first[1]) * chunk(2));
  };
  const unsigned row_line = line_of_row(lane % 16);
  const int row_x = tile.row(2, lane % 16) - tile.halo_first[2];
  // Of rows g and g + 8.
  unsigned row_at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    row_at[half] = line_of_row(lane / 4 + 8 * half) + tile.row(2, lane / 4 + 8 * half) - tile.halo_first[2];
  const bool has_row = tile.has_row(lane / 2);  // lanes 2r and 2r + 1 have row r
  const Pairs of_queries(tile, Side::QUERIES), of_keys(tile, Side::KEYS);
  const Offset d_q_row = row_offset(tile, Step(g, args.d_q_at), lane / 2);
  const Offset d_k_row = row_offset(tile, Step(g, args.d_k_at), lane / 2);
  const Offset d_v_row = row_offset(tile, Step(g, args.d_v_at), lane / 2);

  int stage = 0;
  for (Visit visit(tile); visit.image < g.batch; visit.advance(tile, g)) {
    if (STAGES == 1) {
      __syncthreads();
      fetch();
    }
    cp_async_wait<STAGES == 1 ? 0 : STAGES - 2>();
    __syncthreads();
    if (STAGES > 1) fetch();
    unsigned at = stage * STAGE_BYTES;
    hide(at);
    stage = stage + 1 == STAGES ? 0 : stage + 1;

    float2* const statistics = reinterpret_cast<float2*>(bytes + at + STATISTICS_AT);
#pragma unroll
    for (int first = 0; first < CHUNK_TOKENS; first += THREADS / 2) {
      // Two lanes a query, all lanes of a warp together.
      const int i = first + threadIdx.x / 2, column = min(i, CHUNK_TOKENS - 1);
      const unsigned of_line = column / chunk(2) * chunk(2) * RowFormat<VALUE_DIM>::PITCH;
      float delta = half_product(bytes + at + D_OUT_AT + of_line, bytes + at + OUT_AT + of_line, column % chunk(2));
      if (i < CHUNK_TOKENS && lane % 2 == 0) {
        const float lse = statistics[i].x * LOG2_E;
        if (args.d_lse) {
          const int token = token_at(i);
          if (token >= 0) delta -= args.d_lse[(first_token(visit) + token) * g.heads + tile.head];
        }
        // Every probability of a query that sees no key is 0.
        statistics[i] = make_float2(lse == MINUS_INFINITY ? -MINUS_INFINITY : lse, delta);
      }
    }
    __syncthreads();
    if constexpr (IS_ROUNDED) {
      round_columns<HEAD_DIM>(bytes + at + Q_AT);
      round_columns<HEAD_DIM>(bytes + at + K_AT);
      round_columns<VALUE_DIM>(bytes + at + V_AT);
      round_columns<VALUE_DIM>(bytes + at + D_OUT_AT);
      __syncthreads();
    }
    if (!tile.is_active) continue;

    const unsigned place = at + OUT_AT + threadIdx.x / 32 * GRADIENT_BYTES;
    constexpr int PITCH = RowFormat<HEAD_DIM>::PITCH, VALUE_PITCH = RowFormat<VALUE_DIM>::PITCH;
    const unsigned q_line = at + Q_AT + line * PITCH, k_line = at + K_AT + line * PITCH;
    const unsigned v_line = at + V_AT + line * VALUE_PITCH, d_out_line = at + D_OUT_AT + line * VALUE_PITCH;
    {
      Rows<HEAD_DIM, HAS_ROOM> q;
      Rows<VALUE_DIM, HAS_ROOM> d_out;
      q.load_columns(shared, at + Q_AT + row_line * PITCH, row_x, scale.flip);
      d_out.load_columns(shared, at + D_OUT_AT + row_line * VALUE_PITCH, row_x);
      const float2 of_row[2] = {statistics[row_at[0]], statistics[row_at[1]]};
      const unsigned k_columns = score_columns<HEAD_DIM>(shared, k_line, x);
      const unsigned v_columns = score_columns<VALUE_DIM>(shared, v_line, x);
      const SumColumns<HEAD_DIM> k(shared, k_line, x);
      float d_q[HEAD_DIM / 8][4] = {};
#pragma unroll
      for (int u = 0; u < GROUPS; ++u) {
        if (of_queries.is_empty(u)) continue;
        float d_scores[2][4], d_probs[2][4];
        of_queries.load(u, d_scores);
        q.multiply(d_scores, k_columns, group_bytes<HEAD_DIM>(u));
#pragma unroll
        for (int j = 0; j < 8; ++j) d_probs[j / 4][j % 4] = -of_row[j % 4 / 2].y;
        d_out.multiply(d_probs, v_columns, group_bytes<VALUE_DIM>(u));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& d_score = d_scores[j / 4][j % 4];
          d_score = exp2_approx(fmaf(d_score, scale.exponent, -of_row[j % 4 / 2].x)) * d_probs[j / 4][j % 4];
        }
        k.add(d_q, d_scores, group_bytes<HEAD_DIM>(u));
      }
      put<HEAD_DIM>(shared, place, d_q, args.scale, origin_of(tile, g, args.d_q, args.d_q_at, visit) + d_q_row, has_row);
    }
    {
      Rows<HEAD_DIM, HAS_ROOM> k;
      Rows<VALUE_DIM, HAS_ROOM> v;
      k.load_columns(shared, at + K_AT + row_line * PITCH, row_x, scale.flip);
      v.load_columns(shared, at + V_AT + row_line * VALUE_PITCH, row_x);
      const unsigned q_columns = score_columns<HEAD_DIM>(shared, q_line, x);
      const unsigned d_out_columns = score_columns<VALUE_DIM>(shared, d_out_line, x);
      const SumColumns<HEAD_DIM> q(shared, q_line, x);
      const SumColumns<VALUE_DIM> d_out(shared, d_out_line, x);
      const float2* const of_box = statistics + line + x + lane % 4 * 2;
      float d_k[HEAD_DIM / 8][4] = {}, d_v[VALUE_DIM / 8][4] = {};
#pragma unroll
      for (int u = 0; u < GROUPS; ++u) {
        if (of_keys.is_empty(u)) continue;
        float probs[2][4], d_scores[2][4];
        float2 of_columns[2][2];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          of_columns[j / 2][j % 2] = of_box[group_tokens(u) + j / 2 * (PAIRS_OF_LINES ? chunk(2) : 8) + j % 2];
        of_keys.load(u, probs);
        k.multiply(probs, q_columns, group_bytes<HEAD_DIM>(u));
#pragma unroll
        for (int j = 0; j < 8; ++j) d_scores[j / 4][j % 4] = -of_columns[j / 4][j % 2].y;
        v.multiply(d_scores, d_out_columns, group_bytes<VALUE_DIM>(u));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& p = probs[j / 4][j % 4];
          p = exp2_approx(fmaf(p, scale.exponent, -of_columns[j / 4][j % 2].x));
          d_scores[j / 4][j % 4] *= p;
        }
        d_out.add(d_v, probs, group_bytes<VALUE_DIM>(u));
        q.add(d_k, d_scores, group_bytes<HEAD_DIM>(u));
      }
      put<HEAD_DIM>(shared, place, d_k, args.scale, origin_of(tile, g, args.d_k, args.d_k_at, visit) + d_k_row, has_row);
      put<VALUE_DIM>(shared, place, d_v, 1.f, origin_of(tile, g, args.d_v, args.d_v_at, visit) + d_v_row, has_row);
    }
  }
}
