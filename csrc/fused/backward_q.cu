// dQ of a tile of queries, the statistics that backward_kv.cu reads, and the block's part of the bias gradient.
//
// The offset between a row and a column of a tile is the same for every visit. So dS adds up over the visits of a block
// where it lies, in the fragments' registers, and is summed along the diagonals of equal offset once, at the end; where
// those registers are too many, the diagonals are summed at once. Either way a warp adds to a table of its own, a lane to
// entries of its own, and the block sums its warps in order.
#include "two_pass.cuh"

using namespace natrain;

static_assert(ROWS == Side::QUERIES);
constexpr bool BIAS_GRAD = NATRAIN_BIAS_GRAD;
constexpr bool BIAS_HELD = RESIDENT && GROUPS <= 8;
// One group's dS as a matrix [16 rows, 16 columns], and the tables of the warps.
constexpr int MATRIX_PITCH = 17;
constexpr int MATRIX_BYTES = 16 * MATRIX_PITCH * 4;
constexpr int GRADIENT_BYTES = BIAS_GRAD ? WARPS * (MATRIX_BYTES + ENTRIES * 4) : 0;
static_assert(AFTER_TABLE + GRADIENT_BYTES <= NATRAIN_SHARED_BYTES);

// Adds the sums of dS along its diagonals to this warp's table. `z`, `y`, `x`: of the group's first column in the halo.
__device__ __forceinline__ void add_diagonals(const float (&d_scores)[2][4], const Tile& tile, int z, int y, int x, int u,
                                              float* matrix, float* table) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i)
    matrix[(lane / 4 + i % 4 / 2 * 8) * MATRIX_PITCH + i / 4 * 8 + lane % 4 * 2 + i % 2] = d_scores[i / 4][i % 4];
  __syncwarp();
  constexpr int COLUMNS = PAIRS_OF_LINES ? 8 : 16, LINES = 16 / COLUMNS;
  constexpr int DIAGONALS = COLUMNS + row_tile(2) - 1, ROW_LINES = row_tile(0) * row_tile(1), OF_LINE = ROW_LINES * DIAGONALS;
  const auto add = [&](int i) {
    const int diagonal = i % DIAGONALS - (row_tile(2) - 1), row_line = i / DIAGONALS % ROW_LINES, second = i / OF_LINE;
    float sum = 0;
#pragma unroll
    for (int row = 0; row < row_tile(2); ++row) {
      const int column = diagonal + row;
      if (unsigned(column) < unsigned(COLUMNS)) sum += matrix[(row_line * row_tile(2) + row) * MATRIX_PITCH + second * COLUMNS + column];
    }
    const int line = group_line(u, second);
    const int row[3] = {tile.row_first[0] + row_line / row_tile(1) - tile.halo_first[0],
                        tile.row_first[1] + row_line % row_tile(1) - tile.halo_first[1], tile.row_first[2] - tile.halo_first[2]};
    const int at[3] = {bias_index(0, row[0], z + line / step(1)), bias_index(1, row[1], y + line % step(1)),
                       bias_index(2, row[2], x + group_x(u, 0) + diagonal)};
    bool has = true;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) has = has && unsigned(at[axis]) < unsigned(2 * kernel_size(axis) - 1);
    if (has) table[(at[0] * BIAS_Y + at[1]) * BIAS_X + at[2]] += sum;
  };
#pragma unroll 1
  for (int i = lane; i < OF_LINE; i += 32) add(i);
  if constexpr (LINES > 1) {
    // Of several lines of rows, the second line meets the entries of the first by other lanes.
    if (ROW_LINES > 1) __syncwarp();
#pragma unroll 1
    for (int i = OF_LINE + lane; i < LINES * OF_LINE; i += 32) add(i);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, NATRAIN_MIN_BLOCKS)
    natrain_fused_backward_q(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(bytes);
  const Shared shared{bytes, shared_address(bytes)};
  const Geometry& g = args.geometry;
  const Tile tile(g);
  const Scale scale(args.scale);
  float* const matrix = reinterpret_cast<float*>(bytes + AFTER_TABLE) + threadIdx.x / 32 * (MATRIX_BYTES / 4);
  float* const tables = reinterpret_cast<float*>(bytes + AFTER_TABLE + WARPS * MATRIX_BYTES);
  float* const table = tables + threadIdx.x / 32 * ENTRIES;
  if constexpr (BIAS_GRAD)
    for (int i = threadIdx.x; i < WARPS * ENTRIES; i += THREADS) tables[i] = 0;

  let_next_kernel_start();
  Stream stream(args, tile, shared.address);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) stream.fetch();
  fill_table(bytes, tile, args.rpb, scale);

  const int lane = threadIdx.x % 32;
  const LaneRows lane_rows(tile);
#if NATRAIN_START_TABLE
  Start start(tile, TABLE_AT);
#else
  Start start(tile, bias_of_head(args.rpb, tile), scale.per_scale);
#endif
  const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];
  const bool has_row = tile.has_row(lane / 2);  // lanes 2r and 2r + 1 have row r
  // Of the visit that comes: this lane's row.
  long long row_at = (tile.first_image * tokens + tile.row_token(g, lane / 2)) * g.heads + tile.head;
  float2* statistics = args.statistics + (tile.first_image * (long long)g.heads + tile.head) * tokens + tile.row_token(g, lane / 2);
  Element* d_q_row = lane_row(g, tile, args.d_q, args.d_q_at, tile.head);
  float next_lse = tile.first_image < g.batch ? args.lse[row_at] : 0.f;
  if (RESIDENT) start.to_step(lane_rows, tile.box_first[0], tile.box_first[1], tile.box_first[2]);

  Rows<HEAD_DIM> q;
  Rows<VALUE_DIM> d_out;
  float d_q[HEAD_DIM / 8][4];
  float d_bias[BIAS_GRAD && BIAS_HELD ? GROUPS : 1][2][4] = {};
  float lse[2], delta[2];  // of rows g and g + 8
  int stage = 0, rows_buffer = 0;
  for (Place place(tile); place.image < g.batch; place.advance(tile, g)) {
    next_stage(stream, bytes + stage * STAGE_BYTES);
    if (STAGES > 1) stream.fetch();
    const unsigned stage_at = stage * STAGE_BYTES, rows_at = Stream::rows_at(rows_buffer);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    const bool is_last = place.is_last(tile);
    if (is_last) rows_buffer = rows_buffer + 1 == STAGES ? 0 : rows_buffer + 1;
    if (!tile.is_active) continue;

    if (place.is_first()) {
      // Of d_out as it is, before its rows are rounded.
      float row_delta = half_product(bytes + rows_at + ROWS_1_BYTES, bytes + rows_at + ROWS_1_BYTES + ROWS_2_BYTES, lane / 2);
      q.load(shared, rows_at, scale.flip);
      d_out.load(shared, rows_at + ROWS_1_BYTES);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) d_q[i / 4][i % 4] = 0;
      float row_lse = next_lse * LOG2_E;
      if (args.d_lse) row_delta -= args.d_lse[row_at];
      const Visit next = place.next_visit(tile, g);
      row_at += Leap(tile, Leap::walk_tokens(g), g.splits * tokens).to(next) * g.heads;
      if (next.image < g.batch) next_lse = args.lse[row_at];
      // Every probability of a query that sees no key is 0, and of a row that is none.
      if (row_lse == MINUS_INFINITY || !has_row) row_lse = -MINUS_INFINITY;
      if (has_row && lane % 2 == 0) *statistics = make_float2(row_lse, row_delta);
      statistics += Leap(tile, Leap::walk_tokens(g), g.splits * (long long)g.heads * tokens).to(next);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lse[half] = __shfl_sync(WARP, row_lse, lane / 4 * 2 + 16 * half);
        delta[half] = __shfl_sync(WARP, row_delta, lane / 4 * 2 + 16 * half);
      }
    }

    for_each_step(tile, place, [&](int z, int y, int x) {
      if (!RESIDENT) start.to_step(lane_rows, z, y, x);
      const unsigned line = ((z - place.at[0]) * chunk(1) + y - place.at[1]) * chunk(2);
      const int x_in_chunk = x - place.at[2];
      const unsigned k_line = stage_at + line * RowFormat<HEAD_DIM>::PITCH;
      const unsigned v_line = stage_at + COLUMNS_1_BYTES + line * RowFormat<VALUE_DIM>::PITCH;
      const unsigned k_columns = score_columns<HEAD_DIM>(shared, k_line, x_in_chunk);
      const unsigned v_columns = score_columns<VALUE_DIM>(shared, v_line, x_in_chunk);
      const SumColumns<HEAD_DIM> k(shared, k_line, x_in_chunk);
      const LaneColumns columns{tile.halo_first[0] + z, tile.halo_first[1] + y, tile.halo_first[2] + x};
#pragma unroll
      for (int first = 0; first < GROUPS; first += AT_ONCE) {
        const auto is_idle = [&](int u) { return start.is_empty(u) || is_past(tile, z, y, x, u); };
        if (is_idle(first) && (AT_ONCE == 1 || first + 1 >= GROUPS || is_idle(first + 1))) continue;
        float all_scores[AT_ONCE][2][4], all_d_probs[AT_ONCE][2][4];
        for_each_at_once(first, [&](int u, int i) {
          start.load(shared, u, all_scores[i]);
          q.multiply(all_scores[i], k_columns, group_bytes<HEAD_DIM>(u));
        });
        for_each_at_once(first, [&](int u, int i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) all_d_probs[i][j / 4][j % 4] = HAS_DROPOUT ? 0 : -delta[j % 4 / 2];
          d_out.multiply(all_d_probs[i], v_columns, group_bytes<VALUE_DIM>(u));
        });
        for_each_at_once(first, [&](int u, int i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& d_score = all_scores[i][j / 4][j % 4];
            float d_prob = all_d_probs[i][j / 4][j % 4];
            float p = exp2_approx(fmaf(d_score, scale.exponent, -lse[j % 4 / 2]));
            if constexpr (HAS_KEY_MASK || HAS_DROPOUT) {
              int key[3];
              columns.locate(u, j, key);
              if (HAS_KEY_MASK && !__ldg(args.key_mask + place.image * tokens + token_of(tile, g, key))) p = 0;
              if (HAS_DROPOUT) {
                const int r = lane / 4 + j % 4 / 2 * 8;
                const int query[3] = {tile.row(0, r), tile.row(1, r), tile.row(2, r)};
                const DropoutRow row(*args.seed, dropout_row(g, place.image, g.heads, tile.head, tile.row_token(g, r)));
                const bool kept = row.keeps(slot_of(tile, query, key), args.drop_threshold);
                d_prob = (kept ? d_prob * args.keep_scale : 0) - delta[j % 4 / 2];
              }
            }
            d_score = p * d_prob;
          }
        });
        for_each_at_once(first, [&](int u, int i) {
          k.add(d_q, all_scores[i], group_bytes<HEAD_DIM>(u));
          if constexpr (BIAS_GRAD && BIAS_HELD) {
#pragma unroll
            for (int j = 0; j < 8; ++j) d_bias[u][j / 4][j % 4] += all_scores[i][j / 4][j % 4];
          } else if constexpr (BIAS_GRAD) {
            add_diagonals(all_scores[i], tile, z, y, x, u, matrix, table);
          }
        });
      }
    });

    if (is_last) {
      const float factor[2] = {args.scale, args.scale};
      __syncwarp();
      put_rows<HEAD_DIM>(shared, rows_at, d_q, factor);
      __syncwarp();
      if (has_row) store_row<HEAD_DIM>(bytes + rows_at, d_q_row);
      d_q_row += Leap(tile, g, args.d_q_at).to(place.next_visit(tile, g));
    }
  }

  if constexpr (BIAS_GRAD) {
    if constexpr (BIAS_HELD) {
      if (tile.is_active) {
#pragma unroll
        for (int u = 0; u < GROUPS; ++u)
          add_diagonals(d_bias[u], tile, tile.box_first[0], tile.box_first[1], tile.box_first[2], u, matrix, table);
      }
    }
    __syncthreads();
    const unsigned at = tile.number(g, args.partials);
    float* partial = args.bias_partial + ((long long)tile.head * args.partials + at) * ENTRIES;
    for (int i = threadIdx.x; i < ENTRIES; i += THREADS) {
      float sum = 0;
      for (int warp = 0; warp < WARPS; ++warp) sum += tables[warp * ENTRIES + i];
      partial[i] = sum;
    }
  }
}
