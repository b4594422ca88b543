// scores[query, slot] = scale * q . k (+ rpb); a slot that is no neighbour, and a row's padding, hold `fill`.
#include "products.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;
  double scale, fill;
  const Element* q;
  const Element* k;
  const float* rpb;  // [N, 2kz-1, 2ky-1, 2kx-1], read when NATRAIN_HAS_RPB
  Element* scores;
  Layout q_at, k_at, scores_at;
};

constexpr int KZ = kernel_size(0), KY = kernel_size(1), KX = kernel_size(2);
constexpr int D_PITCH = row_pitch(false), SCORES_PITCH = PITCH * sizeof(Element);
// Keys of the halo, then of every warp its queries and its rows of scores.
constexpr int QUERIES_AT = HALO * D_PITCH, SCORES_AT = QUERIES_AT + WARPS * ROWS * D_PITCH;
static_assert(SCORES_AT + WARPS * ROWS * SCORES_PITCH == NATRAIN_SHARED_BYTES);

// One of a lane's two queries: its window, counted from the halo's first key.
struct Query {
  int first[3], count[3];
  int bias;  // entry of the key at (0, 0, 0)
  Element* scores;

  __device__ __forceinline__ Query(const Tile& tile, int r, Element* rows) : scores(rows + r * PITCH) {
    bias = 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int n = tile.length[axis], k = kernel_size(axis), position = min(tile.row(axis, r), n - 1);
      const int start = window_start(position, n, k, window_stride(axis), is_causal(axis));
      first[axis] = start - tile.halo_first[axis];
      count[axis] = window_end(position, n, k, window_stride(axis), is_causal(axis)) - start;
      bias = bias * (2 * k - 1) + (tile.halo_first[axis] - position + k - 1);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) natrain_gemm_qk(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  const Tile tile(args.geometry);
  const unsigned keys_at = shared_address(shared);
  const unsigned queries_at = keys_at + QUERIES_AT + tile.warp * ROWS * D_PITCH;
  unsigned char* const own_scores = shared + SCORES_AT + tile.warp * ROWS * SCORES_PITCH;

  fetch_halo<PIECES, 2 * DEPTHS>(tile, args.geometry, args.k, args.k_at, keys_at, D_PITCH);
  fetch_own<PIECES, 2 * DEPTHS>(tile, args.geometry, args.q, args.q_at, queries_at, D_PITCH);
  cp_async_commit();
  if (NEIGHBORS < PITCH || is_causal(0) || is_causal(1) || is_causal(2)) {
    const Element fill = narrow<Element>(float(args.fill));
    for (int i = tile.lane; i < ROWS * PITCH; i += 32) reinterpret_cast<Element*>(own_scores)[i] = fill;
  }
  cp_async_wait<0>();
  __syncthreads();
  if (!tile.is_active) return;

  unsigned a[DEPTHS][4];
  load_left(queries_at, tile.lane, a);
  Element* const rows = reinterpret_cast<Element*>(own_scores);
  const Query queries[2] = {Query(tile, tile.lane / 4, rows), Query(tile, tile.lane / 4 + 8, rows)};
  const float scale = float(args.scale);
#if NATRAIN_HAS_RPB
  const float* const bias = args.rpb + tile.head * (long long)((2 * KZ - 1) * (2 * KY - 1) * (2 * KX - 1));
#endif

  for (int block = tile.box_first[2]; block < tile.box_end[2]; block += 8) {
    const int x = block + tile.lane % 4 * 2;
    for (int z = tile.box_first[0]; z < tile.box_end[0]; ++z) {
#pragma unroll 4
      for (int y = tile.box_first[1]; y < tile.box_end[1]; ++y) {
        float dots[4] = {};
        dot_products(a, keys_at + ((z * halo(1) + y) * halo(2) + block) * D_PITCH, tile.lane, dots);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Query& query = queries[i];
          const int slot_z = z - query.first[0], slot_y = y - query.first[1];
          if (unsigned(slot_z) >= unsigned(query.count[0]) || unsigned(slot_y) >= unsigned(query.count[1])) continue;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int slot_x = x + j - query.first[2];
            if (unsigned(slot_x) >= unsigned(query.count[2])) continue;
            float score = dots[2 * i + j] * scale;
#if NATRAIN_HAS_RPB
            score += __ldg(bias + (query.bias + (z * (2 * KY - 1) + y) * (2 * KX - 1) + x + j));
#endif
            query.scores[(slot_z * KY + slot_y) * KX + slot_x] = narrow<Element>(score);
          }
        }
      }
    }
  }
  __syncwarp();
  store_own<WEIGHT_PIECES>(tile, args.geometry, own_scores, SCORES_PITCH, args.scores, args.scores_at);
}
