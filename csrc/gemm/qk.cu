// scores[query, slot] = scale * q . k (+ rpb); a slot that is no neighbour, and a row's padding, hold `fill`.
//
// A warp collects its 16 rows of scores in shared memory and writes them in 16-byte pieces. Of a long row it holds the slots
// of one chunk of keys: slots are in the order of keys, so that a chunk continues where the last one ended.
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
constexpr bool ANY_CAUSAL = is_causal(0) || is_causal(1) || is_causal(2);
// Scores of a row that a warp holds: those of a chunk, and of the piece that the chunk before left incomplete.
constexpr int HELD = NATRAIN_HELD, HELD_PIECES = HELD / PIECE, HELD_PITCH = HELD * sizeof(Element);
static_assert(HELD % PIECE == 0 && (CHUNKS > 1 || HELD == PITCH));
constexpr int D_PITCH = row_pitch(false);
// The head's bias, where it is small; a large one is read from global memory.
constexpr int ENTRIES = (2 * KZ - 1) * (2 * KY - 1) * (2 * KX - 1);
constexpr bool IS_BIAS_STAGED = NATRAIN_BIAS_BYTES > 0;
static_assert(!IS_BIAS_STAGED || NATRAIN_BIAS_BYTES >= ENTRIES * sizeof(float));
// Keys of a chunk or two, then of every warp its queries and its rows of scores, then the bias.
constexpr int QUERIES_AT = STAGES * CHUNK * D_PITCH, SCORES_AT = QUERIES_AT + WARPS * ROWS * D_PITCH;
constexpr int BIAS_AT = SCORES_AT + WARPS * ROWS * HELD_PITCH;
static_assert(BIAS_AT + NATRAIN_BIAS_BYTES == NATRAIN_SHARED_BYTES);

// A query's window, counted from the halo's first key.
struct Query {
  int first[3], count[3];
  int bias;  // entry of the key at (0, 0, 0)

  __device__ __forceinline__ Query(const Tile& tile, int r) : bias(0) {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const int n = tile.length[axis], k = kernel_size(axis), position = min(tile.row(axis, r), n - 1);
      const int start = window_start(position, n, k, window_stride(axis), is_causal(axis));
      first[axis] = start - tile.halo_first[axis];
      count[axis] = window_end(position, n, k, window_stride(axis), is_causal(axis)) - start;
      bias = bias * (2 * k - 1) + (tile.halo_first[axis] - position + k - 1);
    }
  }

  // Slots of the keys before column `column` of the halo, in the order of memory.
  __device__ __forceinline__ int slots_before(int column) const {
    const int z = column / (halo(2) * halo(1)) - first[0], y = column / halo(2) % halo(1) - first[1];
    const int x = column % halo(2) - first[2];
    if (z < 0 || z >= KZ) return z < 0 ? 0 : NEIGHBORS;
    if (y < 0 || y >= KY) return (z + (y >= KY)) * KY * KX;
    return (z * KY + y) * KX + min(max(x, 0), KX);
  }
  // The first slot held during a chunk.
  __device__ __forceinline__ int held_from(int chunk) const {
    return CHUNKS == 1 ? 0 : slots_before(chunk * CHUNK) / PIECE * PIECE;
  }
};

struct Scores {
  Element* held;     // [ROWS, HELD], of the warp
  uint4 fill_piece;

  __device__ __forceinline__ void fill(int lane, int from_piece) const {
    if (CHUNKS == 1 && NEIGHBORS == PITCH && !ANY_CAUSAL) return;
    const int count = HELD_PIECES - from_piece;
    for (int i = lane; i < ROWS * count; i += 32)
      reinterpret_cast<uint4*>(held)[i / count * HELD_PIECES + from_piece + i % count] = fill_piece;
  }

  // Writes the pieces that are complete after a chunk, and moves the incomplete one to the front.
  __device__ __forceinline__ void flush(const Tile& tile, const Geometry& g, int chunk, Element* out,
                                        const Layout& at) const {
    if constexpr (CHUNKS == 1) {
      store_own<WEIGHT_PIECES>(tile, g, reinterpret_cast<const unsigned char*>(held), HELD_PITCH, out, at);
    } else {
      const bool is_last = chunk == CHUNKS - 1;
      Element* const origin = tile.origin(out, at);
      const Step step(g, at);
      // A causal query's slots may end before its row does.
      const int count = is_last && ANY_CAUSAL ? WEIGHT_PIECES : HELD_PIECES;
      for (int i = tile.lane; i < ROWS * count; i += 32) {
        const int r = i / count, piece = i % count;
        if (!tile.has_row(r)) continue;
        const Query query(tile, r);
        const int first = query.held_from(chunk) / PIECE;
        const int end = is_last ? WEIGHT_PIECES : query.held_from(chunk + 1) / PIECE;
        if (first + piece < end)
          *reinterpret_cast<uint4*>(origin + step.to_row(tile, r) + (first + piece) * PIECE) =
              piece < HELD_PIECES ? reinterpret_cast<const uint4*>(held)[r * HELD_PIECES + piece] : fill_piece;
      }
      __syncwarp();
      if (tile.lane < ROWS && !is_last) {
        const Query query(tile, tile.lane);
        const int next = (query.held_from(chunk + 1) - query.held_from(chunk)) / PIECE;
        uint4* const row = reinterpret_cast<uint4*>(held) + tile.lane * HELD_PIECES;
        if (next > 0) row[0] = next < HELD_PIECES ? row[next] : fill_piece;
      }
      __syncwarp();
      fill(tile.lane, 1);
      __syncwarp();
    }
  }
};

extern "C" __global__ void NATRAIN_GEMM_BOUNDS natrain_gemm_qk(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  const Tile tile(args.geometry);
  const unsigned keys_at = shared_address(shared);
  const unsigned queries_at = keys_at + QUERIES_AT + tile.warp * ROWS * D_PITCH;
  union {
    Element elements[PIECE];
    uint4 piece;
  } fill;
  for (int i = 0; i < PIECE; ++i) fill.elements[i] = narrow<Element>(float(args.fill));
  const Scores scores = {reinterpret_cast<Element*>(shared + SCORES_AT + tile.warp * ROWS * HELD_PITCH), fill.piece};

  fetch_own<PIECES, 2 * DEPTHS>(tile, args.geometry, args.q, args.q_at, queries_at, D_PITCH);
  scores.fill(tile.lane, 0);
  const Query queries[2] = {Query(tile, tile.lane / 4), Query(tile, tile.lane / 4 + 8)};
  const float scale = float(args.scale);
#if NATRAIN_HAS_RPB
  const float* bias = args.rpb + tile.head * (long long)ENTRIES;
  if constexpr (IS_BIAS_STAGED) {
    float* const staged = reinterpret_cast<float*>(shared + BIAS_AT);
    for (int i = threadIdx.x; i < ENTRIES; i += THREADS) staged[i] = __ldg(bias + i);
    bias = staged;
  }
#endif

  unsigned a[DEPTHS][4];
  for_each_chunk<PIECES, 2 * DEPTHS>(tile, args.geometry, args.k, args.k_at, keys_at, D_PITCH, [&](int chunk, int stage) {
    if (chunk == 0) load_left(queries_at, tile.lane, a);
    Element* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) rows[i] = scores.held + (tile.lane / 4 + 8 * i) * HELD - queries[i].held_from(chunk);
    for (int block = first_x(tile, chunk); block < end_x(tile, chunk); block += 8) {
      const int x = block + tile.lane % 4 * 2;
      Element* at[2];  // score of column x in the first line of either query's window
      const float* entry[2];  // its bias, were it in line (0, 0)
      bool holds[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        at[i] = rows[i] + (x - queries[i].first[2]);
#if NATRAIN_HAS_RPB
        entry[i] = bias + (queries[i].bias + x);
#endif
#pragma unroll
        for (int j = 0; j < 2; ++j) holds[i][j] = unsigned(x + j - queries[i].first[2]) < unsigned(queries[i].count[2]);
      }
      for_each_line(tile, chunk, block, [&](int z, int y, int row) {
        float dots[4] = {};
        dot_products(a, keys_at + (stage + row) * D_PITCH, tile.lane, dots);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Query& query = queries[i];
          const int slot_z = z - query.first[0], slot_y = y - query.first[1];
          const bool has_line = unsigned(slot_z) < unsigned(query.count[0]) && unsigned(slot_y) < unsigned(query.count[1]);
          float score[2] = {dots[2 * i] * scale, dots[2 * i + 1] * scale};
#if NATRAIN_HAS_RPB
          const float* line = entry[i] + (z * (2 * KY - 1) + y) * (2 * KX - 1);
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (has_line && holds[i][j]) score[j] += line[j];
#endif
          Element* const to = at[i] + (slot_z * KY + slot_y) * KX;
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (has_line && holds[i][j]) to[j] = narrow<Element>(score[j]);
        }
      });
    }
    __syncwarp();
    scores.flush(tile, args.geometry, chunk, args.scores, args.scores_at);
  });
}
