// scores[query, slot] = scale * q . k (+ rpb); a slot that is no neighbour, and a row's padding, hold `fill`.
//
// A warp collects its 16 rows of scores in shared memory and writes them in 16-byte pieces. Of a long row it holds the slots
// of one chunk of keys: slots are in the order of keys, so that a chunk continues where the last one ended. Where the head is
// cut into slices, the warp's scores of a chunk are sums in registers until its last slice has come.
//
// Where rows are held whole their softmax may be taken before they leave, or that of probs be differentiated (q and k are
// then d_out and v), which spares a pass over the weights that reads and writes them (NATRAIN_ROW_STEP).
#include "products.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;
  double scale, fill;
  const Element* q;
  const Element* k;
  const float* rpb;  // [N, 2kz-1, 2ky-1, 2kx-1], read when NATRAIN_HAS_RPB
  Element* scores;
  const Element* probs;  // as scores; read by the derivative of the softmax
  float* lse;            // [B, *S, N]: log of the sum of exponentials of a row, which the softmax writes
  const float* d_lse;    // as lse, read by the derivative; null: no gradient comes through lse
  Layout q_at, k_at, scores_at;
};

// What a row of scores becomes: natrain/ops/gemm_plan.py, RowStep.
constexpr bool IS_SOFTMAX = NATRAIN_ROW_STEP == 1, IS_SOFTMAX_GRAD = NATRAIN_ROW_STEP == 2;
static_assert(CHUNKS == 1 || NATRAIN_ROW_STEP == 0);

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
// Keys of a chunk or two (of two slices), then every warp's queries, slice by slice, its rows of scores, then the bias.
constexpr int BUFFERS = SLICES > 1 ? 2 : STAGES, OWN_BYTES = WARPS * ROWS * D_PITCH;
constexpr int QUERIES_AT = BUFFERS * CHUNK * D_PITCH, SCORES_AT = QUERIES_AT + SLICES * OWN_BYTES;
constexpr int BIAS_AT = SCORES_AT + WARPS * ROWS * HELD_PITCH;
// And the rows of probs.
constexpr int PROBS_AT = BIAS_AT + NATRAIN_BIAS_BYTES;
static_assert(PROBS_AT + (IS_SOFTMAX_GRAD ? WARPS * ROWS * HELD_PITCH : 0) == NATRAIN_SHARED_BYTES);

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
      // Each lane reckons for one row, which its pieces then ask.
      const bool is_last = chunk == CHUNKS - 1;
      const Query query(tile, tile.lane % ROWS);
      const int own_first = query.held_from(chunk) / PIECE;
      const int own_end = is_last ? WEIGHT_PIECES : query.held_from(chunk + 1) / PIECE;
      const OwnRows rows(tile, g, at);
      Element* const origin = tile.origin(out, at);
      // A causal query's slots may end before its row, or a plane of it, does: what follows in the row is filled too.
      const int count = ANY_CAUSAL ? WEIGHT_PIECES : HELD_PIECES;
      for (int begin = 0; begin < ROWS * count; begin += 32) {
        const int i = begin + tile.lane, r = min(i / count, ROWS - 1), piece = i % count;
        const int first = __shfl_sync(WARP, own_first, r), end = __shfl_sync(WARP, own_end, r);
        const Offset row = __shfl_sync(WARP, rows.offset, r);
        if (i < ROWS * count && (rows.there >> r & 1) && first + piece < end)
          *reinterpret_cast<uint4*>(origin + row + (first + piece) * PIECE) =
              piece < HELD_PIECES ? reinterpret_cast<const uint4*>(held)[r * HELD_PIECES + piece] : fill_piece;
      }
      __syncwarp();
      if (tile.lane < ROWS && !is_last) {
        const int next = own_end - own_first;
        uint4* const row = reinterpret_cast<uint4*>(held) + tile.lane * HELD_PIECES;
        if (next > 0) row[0] = next < HELD_PIECES ? row[next] : fill_piece;
      }
      __syncwarp();
      fill(tile.lane, 1);
      __syncwarp();
    }
  }
};

// One of two lanes that share a row of weights in shared memory: every second piece of it, which the other never touches.
struct HalfRow {
  static constexpr int OWN = (HELD_PIECES + 1) / 2;  // pieces, the last one perhaps past the end: zeros
  int first;                                         // piece

  __device__ __forceinline__ int piece(int i) const { return 2 * i + first; }
  __device__ __forceinline__ void read(const Element* row, int i, float (&to)[PIECE]) const {
    if (piece(i) < HELD_PIECES) {
      load_mutable<PIECE>(row + piece(i) * PIECE, to);
    } else {
#pragma unroll
      for (int j = 0; j < PIECE; ++j) to[j] = 0;
    }
  }
  // Calls visit(element of a piece) for those that are a slot of the window.
  template <class Visit>
  __device__ __forceinline__ void for_each_slot(int i, Visit visit) const {
#pragma unroll
    for (int j = 0; j < PIECE; ++j)
      if ((2 * i + 2) * PIECE <= NEIGHBORS || piece(i) * PIECE + j < NEIGHBORS) visit(j);
  }
  __device__ __forceinline__ void write(Element* row, int i, const float (&from)[PIECE]) const {
    if (piece(i) < HELD_PIECES) store<PIECE>(row + piece(i) * PIECE, from);
  }
};

// The row's weights, in registers where a lane's are few.
class RowValues {
 public:
  static constexpr bool IS_HELD = HalfRow::OWN * PIECE <= 32;
  static constexpr int UNROLL = IS_HELD ? HalfRow::OWN : 2;

 private:
  float values[IS_HELD ? HalfRow::OWN : 1][PIECE];
  const HalfRow& at;
  const Element* const row;

 public:
  __device__ __forceinline__ RowValues(const HalfRow& half, const Element* of_row) : at(half), row(of_row) {
    if constexpr (IS_HELD) {
#pragma unroll
      for (int i = 0; i < HalfRow::OWN; ++i) at.read(row, i, values[i]);
    }
  }
  // Writing to what this returns lasts only where values are held.
  __device__ __forceinline__ float (&operator[](int i))[PIECE] {
    if constexpr (IS_HELD) return values[i];
    at.read(row, i, values[0]);
    return values[0];
  }
};

__device__ __forceinline__ float of_both(float x) { return x + __shfl_xor_sync(WARP, x, 1); }

// exp(x - largest): 16-bit weights are rounded to 11 bits or fewer.
__device__ __forceinline__ float exponential(float x, float largest) {
  return IS_FLOAT ? expf(x - largest) : exp2_approx((x - largest) * 1.4426950408889634f);
}

// Softmax of the lane's row, as csrc/naive/softmax.cu has it; the log of its sum of exponentials.
__device__ __forceinline__ float softmax(Element* row, const HalfRow& at) {
  RowValues scores(at, row);
  const float infinity = __uint_as_float(0x7f800000u);
  float largest = -infinity;
#pragma unroll(RowValues::UNROLL)
  for (int i = 0; i < HalfRow::OWN; ++i) {
    const float(&score)[PIECE] = scores[i];
    at.for_each_slot(i, [&](int j) { largest = fmaxf(largest, score[j]); });
  }
  largest = fmaxf(largest, __shfl_xor_sync(WARP, largest, 1));
  const bool is_infinite = largest == infinity || largest == -infinity;
  if (is_infinite) largest = 0;
  float sum = 0;
#pragma unroll(RowValues::UNROLL)
  for (int i = 0; i < HalfRow::OWN; ++i) {
    float(&score)[PIECE] = scores[i];
    at.for_each_slot(i, [&](int j) { sum += score[j] = exponential(score[j], largest); });
  }
  sum = of_both(sum);
  const float inverse_sum = is_infinite ? __uint_as_float(0x7fffffffu) : 1 / sum;
#pragma unroll(RowValues::UNROLL)
  for (int i = 0; i < HalfRow::OWN; ++i) {
    const float(&score)[PIECE] = scores[i];
    float prob[PIECE] = {};
    at.for_each_slot(i, [&](int j) {
      prob[j] = (RowValues::IS_HELD ? score[j] : exponential(score[j], largest)) * inverse_sum;
    });
    at.write(row, i, prob);
  }
  return largest + logf(sum);
}

// d_scores = probs * (d_probs - sum(probs * d_probs) + d_lse), in place of d_probs.
__device__ __forceinline__ void softmax_grad(Element* row, const Element* of_probs, float d_lse, const HalfRow& at) {
  RowValues probs(at, of_probs), d_probs(at, row);
  float sum = 0;
#pragma unroll(RowValues::UNROLL)
  for (int i = 0; i < HalfRow::OWN; ++i) {
    const float(&prob)[PIECE] = probs[i];
    const float(&d_prob)[PIECE] = d_probs[i];
    at.for_each_slot(i, [&](int j) { sum += prob[j] * d_prob[j]; });
  }
  sum = of_both(sum) - d_lse;
#pragma unroll(RowValues::UNROLL)
  for (int i = 0; i < HalfRow::OWN; ++i) {
    const float(&prob)[PIECE] = probs[i];
    const float(&d_prob)[PIECE] = d_probs[i];
    float d_score[PIECE] = {};
    at.for_each_slot(i, [&](int j) { d_score[j] = prob[j] * (d_prob[j] - sum); });
    at.write(row, i, d_score);
  }
}

// What becomes of the warp's rows once their scores are there: lanes 2r and 2r + 1 have row r.
__device__ __forceinline__ void finish_rows(const Arguments& args, const Tile& tile, const Scores& scores, const Element* probs) {
  if constexpr (IS_SOFTMAX || IS_SOFTMAX_GRAD) {
    const int r = tile.lane / 2;
    const HalfRow at{tile.lane % 2};
    Element* const row = scores.held + r * HELD;
    const Geometry& g = args.geometry;
    long long token = tile.batch;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis)
      token = token * g.length[axis] + min(tile.row(axis, r), tile.length[axis] - 1) * g.dilation[axis] + tile.group[axis];
    const long long of_row = token * g.heads + tile.head;
    if constexpr (IS_SOFTMAX) {
      const float lse = softmax(row, at);
      if (at.first == 0 && tile.has_row(r)) args.lse[of_row] = lse;
    } else {
      softmax_grad(row, probs + r * HELD, args.d_lse ? args.d_lse[of_row] : 0.f, at);
    }
    __syncwarp();
  }
}

// Where the scores of the 8 columns from x on go, for the lane's two queries.
struct Columns {
  const Query* queries;
  Element* at[2];         // score of the lane's first column in the first line of either query's window
  const float* entry[2];  // its bias, were it in line (0, 0)
  bool holds[2][2];

  __device__ __forceinline__ Columns(const Query (&of)[2], const Scores& scores, int chunk, const float* bias, int lane,
                                     int first_x)
      : queries(of) {
    const int x = first_x + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      at[i] = scores.held + (lane / 4 + 8 * i) * HELD - of[i].held_from(chunk) + (x - of[i].first[2]);
#if NATRAIN_HAS_RPB
      entry[i] = bias + (of[i].bias + x);
#endif
#pragma unroll
      for (int j = 0; j < 2; ++j) holds[i][j] = unsigned(x + j - of[i].first[2]) < unsigned(of[i].count[2]);
    }
  }

  __device__ __forceinline__ void put(const float (&dots)[4], float scale, int z, int y) const {
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
  }
};

// Lines of a warp's box in a chunk, and groups of 8 columns of a line, at most.
constexpr int CHUNK_LINES = CHUNKS > 1 && HAS_LINES ? CHUNK / halo(2) : NATRAIN_BOX_Z * NATRAIN_BOX_Y;
constexpr int X_BLOCKS = (CHUNKS > 1 && !HAS_LINES ? CHUNK : NATRAIN_BOX_X) / 8;
// Of the halo, the last column at which a group of 8 begins.
constexpr int X_LAST = halo(2) - 8;

// Visits (line, z, y) of every line of the warp's box in a chunk; `line` is known when compiled, so that what is kept of a
// line stays in registers. Where the halo is one chunk also lines past the box of a warp at a border, which are no query's:
// products without a branch in between overlap.
template <class Visit>
__device__ __forceinline__ void for_each_kept_line(const Tile& tile, int chunk, Visit visit) {
#pragma unroll
  for (int line = 0; line < CHUNK_LINES; ++line) {
    const int in_halo = chunk * CHUNK_LINES + line;
    const int z = CHUNKS > 1 ? in_halo / halo(1) : tile.box_first[0] + line / NATRAIN_BOX_Y;
    const int y = CHUNKS > 1 ? in_halo % halo(1) : tile.box_first[1] + line % NATRAIN_BOX_Y;
    if (!HAS_LINES) {
      visit(line, 0, 0);
    } else if (CHUNKS == 1 || (z >= tile.box_first[0] && z < tile.box_end[0] && y >= tile.box_first[1] && y < tile.box_end[1])) {
      visit(line, z, y);
    }
  }
}

// Scores of the warp's rows, chunk after chunk and of each slice after slice; `columns(chunk, x)` knows where those of 8
// columns go, `flush(chunk)` what to do when a chunk's are there.
template <class ColumnsOf, class Flush>
__device__ __forceinline__ void score_slices(const Arguments& args, const Tile& tile, unsigned shared, float scale,
                                             ColumnsOf columns, Flush flush) {
  const unsigned queries_at = shared + QUERIES_AT + tile.warp * ROWS * D_PITCH;
  const auto fetch = [&](int chunk, int slice) {
    fetch_chunk<PIECES, 2 * DEPTHS>(tile, args.geometry, args.k + slice * HEAD_DIM, args.k_at, chunk,
                                    shared + (chunk * SLICES + slice) % 2 * CHUNK * D_PITCH, D_PITCH);
    cp_async_commit();
  };
#pragma unroll 1
  for (int slice = 0; slice < SLICES; ++slice)
    fetch_own<PIECES, 2 * DEPTHS>(tile, args.geometry, args.q + slice * HEAD_DIM, args.q_at, queries_at + slice * OWN_BYTES,
                                  D_PITCH);
  fetch(0, 0);
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int first = first_x(tile, chunk), end = end_x(tile, chunk);
    float dots[CHUNK_LINES][X_BLOCKS][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < SLICES; ++slice) {
      cp_async_wait<0>();
      // Also: all warps are done with the slice before, whose place the next one takes.
      __syncthreads();
      if (slice + 1 < SLICES) {
        fetch(chunk, slice + 1);
      } else if (chunk + 1 < CHUNKS) {
        fetch(chunk + 1, 0);
      }
      if (!tile.is_active) continue;
      unsigned a[DEPTHS][4];
      load_left(queries_at + slice * OWN_BYTES, tile.lane, a);
      for_each_kept_line(tile, chunk, [&](int line, int z, int y) {
        const int row = CHUNKS > 1 ? (z * halo(1) + y) * halo(2) - chunk * CHUNK
                                   : (min(z, halo(0) - 1) * halo(1) + min(y, halo(1) - 1)) * halo(2);
        const unsigned buffer = shared + ((chunk * SLICES + slice) % 2 * CHUNK + row) * D_PITCH;
#pragma unroll
        for (int block = 0; block < X_BLOCKS; ++block) {
          const int x = first + 8 * block, in_line = CHUNKS > 1 ? x : min(x, X_LAST);
          if (CHUNKS == 1 || x < end) dot_products(a, buffer + in_line * D_PITCH, tile.lane, dots[line][block]);
        }
      });
    }
    if (!tile.is_active) continue;
#pragma unroll
    for (int block = 0; block < X_BLOCKS; ++block) {
      if (first + 8 * block >= end) continue;
      const Columns to = columns(chunk, first + 8 * block);
      for_each_kept_line(tile, chunk, [&](int line, int z, int y) { to.put(dots[line][block], scale, z, y); });
    }
    flush(chunk);
  }
}

extern "C" __global__ void NATRAIN_GEMM_BOUNDS natrain_gemm_qk(const __grid_constant__ Arguments args) {
  NATRAIN_DYNAMIC_SHARED(shared);
  const Tile tile(args.geometry, 1);
  const unsigned keys_at = shared_address(shared);
  const unsigned queries_at = keys_at + QUERIES_AT + tile.warp * ROWS * D_PITCH;
  union {
    Element elements[PIECE];
    uint4 piece;
  } fill;
  for (int i = 0; i < PIECE; ++i) fill.elements[i] = narrow<Element>(float(args.fill));
  const Scores scores = {reinterpret_cast<Element*>(shared + SCORES_AT + tile.warp * ROWS * HELD_PITCH), fill.piece};

  if constexpr (SLICES == 1) fetch_own<PIECES, 2 * DEPTHS>(tile, args.geometry, args.q, args.q_at, queries_at, D_PITCH);
  constexpr int OWN_ROWS_BYTES = ROWS * HELD_PITCH;
  if constexpr (IS_SOFTMAX_GRAD)
    fetch_own<WEIGHT_PIECES, WEIGHT_PIECES>(tile, args.geometry, args.probs, args.scores_at,
                                            keys_at + PROBS_AT + tile.warp * OWN_ROWS_BYTES, HELD_PITCH);
  scores.fill(tile.lane, 0);
  const Query queries[2] = {Query(tile, tile.lane / 4), Query(tile, tile.lane / 4 + 8)};
  const float scale = float(args.scale);
  const float* bias = nullptr;
#if NATRAIN_HAS_RPB
  bias = args.rpb + tile.head * (long long)ENTRIES;
  if constexpr (IS_BIAS_STAGED) {
    float* const staged = reinterpret_cast<float*>(shared + BIAS_AT);
    for (int i = threadIdx.x; i < ENTRIES; i += THREADS) staged[i] = __ldg(bias + i);
    bias = staged;
  }
#endif
  const auto columns = [&](int chunk, int x) { return Columns(queries, scores, chunk, bias, tile.lane, x); };

  const auto flush = [&](int chunk) {
    __syncwarp();
    finish_rows(args, tile, scores, reinterpret_cast<const Element*>(shared + PROBS_AT + tile.warp * OWN_ROWS_BYTES));
    scores.flush(tile, args.geometry, chunk, args.scores, args.scores_at);
  };

  if constexpr (SLICES > 1) {
    score_slices(args, tile, keys_at, scale, columns, flush);
  } else {
    unsigned a[DEPTHS][4];
    for_each_chunk<PIECES, 2 * DEPTHS>(tile, args.geometry, args.k, args.k_at, keys_at, D_PITCH, [&](int chunk, int stage) {
      if (chunk == 0) load_left(queries_at, tile.lane, a);
      for (int x = first_x(tile, chunk); x < end_x(tile, chunk); x += 8) {
        const Columns to = columns(chunk, x);
        for_each_line(tile, chunk, x, [&](int z, int y, int row) {
          float dots[4] = {};
          dot_products(a, keys_at + (stage + row) * D_PITCH, tile.lane, dots);
          to.put(dots, scale, z, y);
        });
      }
      flush(chunk);
    });
  }
}
