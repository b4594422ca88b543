// What the backward kernels share. Scores S and probabilities P are computed again from q, k and lse (as FlashAttention
// does, arXiv 2205.14135), in one pass over a tile's columns; nothing is added to memory by more than one warp, so that
// runs repeat bit by bit:
//   P = exp(S - lse), dP = d_out . v, dS = P * (dP - delta), delta = sum(d_out * out) - d_lse of a query;
//   rows are queries (backward_q.cu):  dQ = scale * dS K; also delta, and the bias gradient, a sum of dS;
//   rows are keys (backward_kv.cu):    dK = scale * dS^T Q, dV = P^T d_out, over all heads of q that share the key;
//   first one, then the other (backward_qkv.cu), where one halo of all tensors fits shared memory.
// With dropout P in dV and dP carry the mask and its factor.
#pragma once

#define NATRAIN_COLUMN_USES 2  // scores and sums take the same columns
#include "start.cuh"

namespace natrain {

struct Arguments {
  Geometry geometry;         // heads: of the rows; heads_per_kv: of q for one of them when rows are keys
  int partials;              // of the bias gradient for a head
  float scale;               // of q . k
  float keep_scale;          // 1 / (1 - dropout_p)
  unsigned drop_threshold;
  const Element *q, *k, *v, *out, *d_out;
  const float *lse, *d_lse;  // [B, Z, Y, X, N]; d_lse may be null
  Element *d_q, *d_k, *d_v;
  float2* statistics;        // [B, N, Z, Y, X]: lse in powers of two, and delta; written where rows are queries
  float* bias_partial;       // [N, partials, entries], written where rows are queries
  float* d_rpb;              // [N, entries], written where rows are keys
  const float* rpb;          // [N, 2kz-1, 2ky-1, 2kx-1], read when NATRAIN_HAS_RPB
  const unsigned char* key_mask;  // [B, Z, Y, X], not 0: may be attended; read when NATRAIN_HAS_KEY_MASK
  const long long* seed;     // read when NATRAIN_HAS_DROPOUT
  Layout q_at, k_at, v_at, out_at, d_out_at, d_q_at, d_k_at, d_v_at;
};

constexpr int STAGES = NATRAIN_STAGES;
constexpr bool HAS_DROPOUT = NATRAIN_HAS_DROPOUT, HAS_KEY_MASK = NATRAIN_HAS_KEY_MASK;
// Several heads of q share one of k and v.
constexpr bool IS_GROUPED = NATRAIN_IS_GROUPED;
__device__ __forceinline__ int heads_per_kv(const Geometry& g) { return IS_GROUPED ? g.heads_per_kv : 1; }
constexpr int ENTRIES = BIAS_LINES * BIAS_X;

// Tokens from a step's first column to that of its group u.
__device__ constexpr int group_tokens(int u) { return group_bytes<HEAD_DIM>(u) / RowFormat<HEAD_DIM>::PITCH; }

// Of a tensor in a visit: the first token of this dilation group, as far on as the tile is; the same for all threads.
template <class T>
__device__ __forceinline__ T* origin_of(const Tile& tile, const Geometry& g, T* data, const Layout& at, const Visit& visit) {
  data += visit.image * at.batch + tile.group_origin(at, tile.head);
  return WALKS ? data + visit.walked * Leap::walk_step(g, at) : data;
}

// Lanes 2r and 2r + 1 have row r of the warp's tile: its 16-byte pieces in turn, so that one pointer is enough.
template <int DIM>
__device__ __forceinline__ void store_row(const unsigned char* shared, Element* row) {
  using Format = RowFormat<DIM>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < Format::CHUNKS; first += 2) {
    const int piece = first + lane % 2;
    if (first + 2 <= Format::CHUNKS || piece < Format::CHUNKS)
      *reinterpret_cast<uint4*>(row + piece * int(16 / sizeof(Element))) =
          *reinterpret_cast<const uint4*>(shared + Format::at(lane / 2, piece));
  }
}

// Sum of d_out * out over half a row, column `column` of a line in shared memory; lanes 2r and 2r + 1 share a row.
__device__ __forceinline__ float half_product(const unsigned char* d_out, const unsigned char* out, int column) {
  float sum = 0;
#pragma unroll
  for (int piece = threadIdx.x % 2; piece < RowFormat<VALUE_DIM>::CHUNKS; piece += 2) {
    const unsigned at = RowFormat<VALUE_DIM>::at(column, piece);
    float a[16 / sizeof(Element)], b[16 / sizeof(Element)];
    load_mutable(reinterpret_cast<const Element*>(d_out + at), a);
    load_mutable(reinterpret_cast<const Element*>(out + at), b);
#pragma unroll
    for (int i = 0; i < int(16 / sizeof(Element)); ++i) sum = fmaf(a[i], b[i], sum);
  }
  return sum + __shfl_xor_sync(WARP, sum, 1);
}

}  // namespace natrain
