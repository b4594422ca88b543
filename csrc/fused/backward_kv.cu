// dK and dV of a tile of keys, from the queries whose windows hold them; and the last sum of the bias gradient.
//
// NATRAIN_GRADIENTS 1: dK, 2: dV, 3: both; for head dims whose sums of both would not fit a thread's registers.
#include "two_pass.cuh"

using namespace natrain;

static_assert(ROWS_ARE_KEYS);
static_assert(AFTER_TABLE <= NATRAIN_SHARED_BYTES);
constexpr bool HAS_D_K = NATRAIN_GRADIENTS & 1, HAS_D_V = NATRAIN_GRADIENTS & 2;

// Every entry by one warp, in a fixed order.
__device__ __forceinline__ void sum_bias(const Arguments& args) {
  const int lane = threadIdx.x % 32, count = args.geometry.heads * heads_per_kv(args.geometry) * ENTRIES;
  for (int i = blockIdx.x * WARPS + threadIdx.x / 32; i < count; i += gridDim.x * WARPS) {
    const float* from = args.bias_partial + (long long)(i / ENTRIES) * args.partials * ENTRIES + i % ENTRIES;
    float sum = 0;
    for (int partial = lane; partial < args.partials; partial += 32) sum += from[(long long)partial * ENTRIES];
#pragma unroll
    for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(WARP, sum, width);
    if (lane == 0) args.d_rpb[i] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, NATRAIN_MIN_BLOCKS)
    natrain_fused_backward_kv(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(bytes);
  const Shared shared{bytes, shared_address(bytes)};
  const Geometry& g = args.geometry;
  const Tile tile(g);
  const Scale scale(args.scale);
  Tile of_query = tile;  // the same of a head of q
  of_query.head = tile.head * heads_per_kv(g);

  // Starts while the last blocks of backward_q.cu, whose statistics are awaited where they are read first, still work.
  let_next_kernel_start();
  Stream stream(args, tile, shared.address);
  if (STAGES > 1) stream.begin_fetch();
  fill_table(bytes, of_query, args.rpb, scale);

  const int lane = threadIdx.x % 32;
  const LaneRows lane_rows(tile);
#if NATRAIN_START_TABLE
  Start start(of_query, TABLE_AT);
#else
  Start start(of_query, bias_of_head(args.rpb, of_query), scale.per_scale);
#endif
  const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];
  const bool has_row = tile.has_row(lane / 2);  // lanes 2r and 2r + 1 have row r
  const Offset d_k_row = row_offset(tile, Step(g, args.d_k_at), lane / 2);
  const Offset d_v_row = row_offset(tile, Step(g, args.d_v_at), lane / 2);
  if (RESIDENT) start.to_step(lane_rows, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
  await_previous_kernel();
  if (STAGES > 1) stream.end_fetch();
#pragma unroll
  for (int i = 1; i < STAGES - 1; ++i) stream.fetch();

  Rows<HEAD_DIM> k;
  Rows<VALUE_DIM> v;
  float d_k[HEAD_DIM / 8][4], d_v[VALUE_DIM / 8][4];  // one is never touched where NATRAIN_GRADIENTS leaves it out
  bool may_attend[2] = {true, true};  // to keys g and g + 8
  int stage = 0, rows_buffer = 0;
  for (Place place(tile); place.image < g.batch; place.advance(tile, g)) {
    next_stage(stream, bytes + stage * STAGE_BYTES);
    of_query.head = tile.head * heads_per_kv(g) + place.member;
    if (HAS_RPB && IS_GROUPED && place.is_first()) {
      StartTable::fill(bytes + TABLE_AT, of_query, bias_of_head(args.rpb, of_query), scale.per_scale);
      __syncthreads();
#if !NATRAIN_START_TABLE
      start = Start(of_query, bias_of_head(args.rpb, of_query), scale.per_scale);
      if (RESIDENT) start.to_step(lane_rows, tile.box_first[0], tile.box_first[1], tile.box_first[2]);
#endif
    }
    if (STAGES > 1) stream.fetch();
    const unsigned stage_at = stage * STAGE_BYTES, rows_at = Stream::rows_at(rows_buffer);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    const bool is_last = place.is_last(tile);
    if (is_last) rows_buffer = rows_buffer + 1 == STAGES ? 0 : rows_buffer + 1;
    if (!tile.is_active) continue;

    if (place.is_first()) {
      k.load(shared, rows_at, scale.flip);
      v.load(shared, rows_at + ROWS_1_BYTES);
      if (place.member == 0) {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) d_k[i / 4][i % 4] = 0;
#pragma unroll
        for (int i = 0; i < VALUE_DIM / 2; ++i) d_v[i / 4][i % 4] = 0;
      }
      if constexpr (HAS_KEY_MASK) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          may_attend[half] = __ldg(args.key_mask + place.image * tokens + tile.row_token(g, lane / 4 + 8 * half));
      }
    }

    for_each_step(tile, place, [&](int z, int y, int x) {
      if (!RESIDENT) start.to_step(lane_rows, z, y, x);
      const unsigned line = ((z - place.at[0]) * chunk(1) + y - place.at[1]) * chunk(2);
      const int x_in_chunk = x - place.at[2];
      const unsigned q_line = stage_at + line * RowFormat<HEAD_DIM>::PITCH;
      const unsigned d_out_line = stage_at + COLUMNS_1_BYTES + line * RowFormat<VALUE_DIM>::PITCH;
      const unsigned q_columns = score_columns<HEAD_DIM>(shared, q_line, x_in_chunk);
      const unsigned d_out_columns = score_columns<VALUE_DIM>(shared, d_out_line, x_in_chunk);
      const SumColumns<HEAD_DIM> q(shared, q_line, x_in_chunk);
      const SumColumns<VALUE_DIM> d_out(shared, d_out_line, x_in_chunk);
      const float2* statistics = reinterpret_cast<const float2*>(bytes + stage_at + COLUMNS_1_BYTES + COLUMNS_2_BYTES) + line +
                                 x_in_chunk + lane % 4 * 2;
      const LaneColumns columns{tile.halo_first[0] + z, tile.halo_first[1] + y, tile.halo_first[2] + x};
#pragma unroll
      for (int first = 0; first < GROUPS; first += AT_ONCE) {
        const auto is_idle = [&](int u) { return start.is_empty(u) || is_past(tile, z, y, x, u); };
        if (is_idle(first) && (AT_ONCE == 1 || first + 1 >= GROUPS || is_idle(first + 1))) continue;
        float all_scores[AT_ONCE][2][4], all_d_probs[AT_ONCE][2][4];
        float2 of_columns[AT_ONCE][2][2];  // lse and delta
        for_each_at_once(first, [&](int u, int i) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            of_columns[i][j / 2][j % 2] = statistics[group_tokens(u) + j / 2 * (PAIRS_OF_LINES ? chunk(2) : 8) + j % 2];
          start.load(shared, u, all_scores[i]);
        });
        for_each_at_once(first, [&](int u, int i) { k.multiply(all_scores[i], q_columns, group_bytes<HEAD_DIM>(u)); });
        for_each_at_once(first, [&](int u, int i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) all_d_probs[i][j / 4][j % 4] = HAS_DROPOUT ? 0 : -of_columns[i][j / 4][j % 2].y;
          if constexpr (HAS_D_K) v.multiply(all_d_probs[i], d_out_columns, group_bytes<VALUE_DIM>(u));
        });
        for_each_at_once(first, [&](int u, int i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float2 column = of_columns[i][j / 4][j % 2];
            float& p = all_scores[i][j / 4][j % 4];
            float& d_score = all_d_probs[i][j / 4][j % 4];
            p = exp2_approx(fmaf(p, scale.exponent, -column.x));
            if (HAS_KEY_MASK && !may_attend[j % 4 / 2]) p = 0;
            if constexpr (HAS_DROPOUT) {
              int query[3];
              columns.locate(u, j, query);
              const int r = lane / 4 + j % 4 / 2 * 8;
              const int key[3] = {tile.row(0, r), tile.row(1, r), tile.row(2, r)};
              const DropoutRow row(*args.seed, dropout_row(g, place.image, g.heads * heads_per_kv(g), of_query.head,
                                                           token_of(tile, g, query)));
              const bool kept = row.keeps(slot_of(tile, query, key), args.drop_threshold);
              d_score = p * ((kept ? d_score * args.keep_scale : 0) - column.y);
              p = kept ? p : 0;
            } else {
              d_score *= p;
            }
          }
        });
        for_each_at_once(first, [&](int u, int i) {
          if constexpr (HAS_D_V) d_out.add(d_v, all_scores[i], group_bytes<VALUE_DIM>(u));
          if constexpr (HAS_D_K) q.add(d_k, all_d_probs[i], group_bytes<HEAD_DIM>(u));
        });
      }
    });

    if (is_last && place.member == heads_per_kv(g) - 1) {
      const float of_k[2] = {args.scale, args.scale}, keep = HAS_DROPOUT ? args.keep_scale : 1.f, of_v[2] = {keep, keep};
      __syncwarp();
      if constexpr (HAS_D_K) put_rows<HEAD_DIM>(shared, rows_at, d_k, of_k);
      if constexpr (HAS_D_V) put_rows<VALUE_DIM>(shared, rows_at + ROWS_1_BYTES, d_v, of_v);
      __syncwarp();
      Element* d_k_row_at = origin_of(tile, g, args.d_k, args.d_k_at, place) + d_k_row;
      Element* d_v_row_at = origin_of(tile, g, args.d_v, args.d_v_at, place) + d_v_row;
      if (HAS_D_K && has_row) store_row<HEAD_DIM>(bytes + rows_at, d_k_row_at);
      if (HAS_D_V && has_row) store_row<VALUE_DIM>(bytes + rows_at + ROWS_1_BYTES, d_v_row_at);
    }
  }
  if (NATRAIN_BIAS_GRAD) sum_bias(args);
}
