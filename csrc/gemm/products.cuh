// Products of one warp out of rows in shared memory, for 16-bit elements and for float32: two 16-byte pieces of a row are
// one depth of the tensor core either way (16 halves, or 8 floats).
//
// float32 is TF32 (NATRAIN_TERMS 1), or three TF32 products that keep 21 bits of each factor (NATRAIN_TERMS 3).
#pragma once

#include "tile.cuh"

namespace natrain {

constexpr bool IS_FLOAT = sizeof(Element) == 4;
constexpr int TERMS = NATRAIN_TERMS;
static_assert(TERMS == 1 || (TERMS == 3 && IS_FLOAT));

// Bytes from one row of D in shared memory to the next. ldmatrix is free of bank conflicts when rows are an odd number of
// pieces apart; what float32 reads for weighted sums, pieces of four rows at once, when they are an odd number of 32 bytes
// apart.
__device__ constexpr int row_pitch(bool is_read_by_floats) {
  return is_read_by_floats ? (DEPTHS | 1) * 32 : ((2 * DEPTHS) | 1) * 16;
}

// d += a * b over one depth. A template, so that float32 asks for no 16-bit product.
template <class T = Element>
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(d, a, b);
  } else {
    unsigned a_high[4], b_high[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a_high[i] = to_tf32(__uint_as_float(a[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) b_high[i] = to_tf32(__uint_as_float(b[i]));
    if constexpr (TERMS == 1) {
      mma_m16n8k8_tf32(d, a_high, b_high);
    } else {
      unsigned a_low[4], b_low[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) a_low[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(a_high[i]));
#pragma unroll
      for (int i = 0; i < 2; ++i) b_low[i] = to_tf32(__uint_as_float(b[i]) - __uint_as_float(b_high[i]));
      // Tensor cores round sums toward zero: a long sum is kept outside of them.
      float part[4] = {};
      mma_m16n8k8_tf32(part, a_low, b_high);
      mma_m16n8k8_tf32(part, a_high, b_low);
      mma_m16n8k8_tf32(part, a_high, b_high);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += part[i];
    }
  }
}

// The 16 rows of D at `rows`, as the left factor of all depths.
__device__ __forceinline__ void load_left(unsigned rows, int lane, unsigned (&a)[DEPTHS][4]) {
#pragma unroll
  for (int depth = 0; depth < DEPTHS; ++depth)
    ldmatrix_x4(a[depth], rows + lane % 16 * row_pitch(false) + (2 * depth + lane / 16) * 16);
}

// Dot products of the left rows with the 8 rows of D at `columns`.
__device__ __forceinline__ void dot_products(const unsigned (&a)[DEPTHS][4], unsigned columns, int lane, float (&d)[4]) {
#pragma unroll
  for (int depth = 0; depth < DEPTHS; depth += 2) {
    const unsigned row = columns + lane % 8 * row_pitch(false) + 32 * depth;
    if (depth + 1 < DEPTHS) {
      unsigned b[4];
      ldmatrix_x4(b, row + lane / 8 * 16);
      const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      multiply(d, a[depth], first);
      multiply(d, a[depth + 1 < DEPTHS ? depth + 1 : depth], second);
    } else {
      unsigned b[2];
      ldmatrix_x2(b, row + lane / 8 % 2 * 16);
      multiply(d, a[depth], b);
    }
  }
}

// A lane's weights of 16 rows and COLUMNS columns, as the left factor of weighted sums: word 2 p + i holds, of row lane / 4 + 8 i,
// the columns own_column(lane, p) and, of 16-bit elements, the one after it.
constexpr int PAIRS = IS_FLOAT ? COLUMNS / 4 : 2;
__device__ __forceinline__ int own_column(int lane, int p) { return IS_FLOAT ? lane % 4 + 4 * p : lane % 4 * 2 + 8 * p; }

constexpr int BLOCKS = HEAD_DIM / 8;  // of 8 components of a weighted sum

// sums += weights * the COLUMNS rows of D at `columns`.
__device__ __forceinline__ void weighted_sums(const unsigned (&weights)[2 * PAIRS], unsigned columns,
                                              const unsigned char* shared, int lane, float (&sums)[BLOCKS][4]) {
  if constexpr (IS_FLOAT) {
#pragma unroll
    for (int half = 0; half < COLUMNS / 8; ++half) {
      const unsigned a[4] = {weights[4 * half], weights[4 * half + 1], weights[4 * half + 2], weights[4 * half + 3]};
      const unsigned char* row = shared + columns + (8 * half + lane % 4) * row_pitch(true);
      // Any order of components will do: four blocks are the four words of a piece a lane, which put_sums() undoes.
#pragma unroll
      for (int block = 0; block + 4 <= BLOCKS; block += 4) {
        const unsigned char* piece = row + block * 32 + lane / 4 * 16;
        const uint4 low = *reinterpret_cast<const uint4*>(piece);
        const uint4 high = *reinterpret_cast<const uint4*>(piece + 4 * row_pitch(true));
        const unsigned b[4][2] = {{low.x, high.x}, {low.y, high.y}, {low.z, high.z}, {low.w, high.w}};
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(sums[block + j], a, b[j]);
      }
#pragma unroll
      for (int block = BLOCKS / 4 * 4; block < BLOCKS; ++block) {
        const unsigned char* word = row + block * 32 + lane / 4 * 4;
        const unsigned b[2] = {*reinterpret_cast<const unsigned*>(word),
                               *reinterpret_cast<const unsigned*>(word + 4 * row_pitch(true))};
        multiply(sums[block], a, b);
      }
    }
  } else {
    const unsigned a[4] = {weights[0], weights[1], weights[2], weights[3]};
    const unsigned row = shared_address(shared) + columns + lane % 16 * row_pitch(false);
#pragma unroll
    for (int block = 0; block < BLOCKS; block += 2) {
      if (block + 1 < BLOCKS) {
        unsigned b[4];
        ldmatrix_x4_trans(b, row + (block + lane / 16) * 16);
        const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply(sums[block], a, first);
        multiply(sums[block + 1 < BLOCKS ? block + 1 : block], a, second);
      } else {
        unsigned b[2];
        ldmatrix_x2_trans(b, row + block * 16);
        multiply(sums[block], a, b);
      }
    }
  }
}

// The warp's sums, times a factor, as rows of D in shared memory; whether any is a NaN.
__device__ __forceinline__ bool put_sums(const float (&sums)[BLOCKS][4], float scale, int lane, unsigned char* rows) {
  constexpr int BY_FOUR = IS_FLOAT ? BLOCKS / 4 * 4 : 0;
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned char* const row = rows + (lane / 4 + i / 2 * 8) * row_pitch(false);
#pragma unroll
    for (int block = 0; block < BY_FOUR; block += 4) {
      const float piece[4] = {sums[block][i] * scale, sums[block + 1][i] * scale, sums[block + 2][i] * scale,
                              sums[block + 3][i] * scale};
#pragma unroll
      for (int j = 0; j < 4; ++j) has_nan = has_nan || piece[j] != piece[j];
      *reinterpret_cast<float4*>(row + (2 * block + lane % 4 * 2 + i % 2) * 16) =
          make_float4(piece[0], piece[1], piece[2], piece[3]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned char* const row = rows + (lane / 4 + half * 8) * row_pitch(false);
#pragma unroll
    for (int block = BY_FOUR; block < BLOCKS; ++block) {
      const float pair[2] = {sums[block][2 * half] * scale, sums[block][2 * half + 1] * scale};
      has_nan = has_nan || pair[0] != pair[0] || pair[1] != pair[1];
      store<2>(reinterpret_cast<Element*>(row + (8 * block + lane % 4 * 2) * sizeof(Element)), pair);
    }
  }
  return has_nan;
}

}  // namespace natrain
