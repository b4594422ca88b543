// The two matrix products of the tensor-core kernels, 16 rows by 16 columns at a time: scores (rows . columns, over D) and
// sums (weights . columns, over the 16 columns). Scores stay in the fragment in which the mma leaves them: weights[i][j]
// of n8 block i is row g + 8 * (j / 2), column 2t + j % 2, g = lane / 4, t = lane % 4.
//
// float32 multiplies in TF32, or with NATRAIN_TF32_TERMS 3 as big * big + big * small + small * big, which keeps 21 bits.
// TF32's factors are rounded before they get here where that saves work (IS_ROUNDED), else for every product.
#pragma once

#include "halo.cuh"

namespace natrain {

// Shared memory by byte offset: ldmatrix and cp.async want addresses, plain loads pointers.
struct Shared {
  unsigned char* bytes;
  unsigned address;
};

template <class T>
struct Multiply {
  static __device__ __forceinline__ void add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16<T>(d, a, b);
  }
};
template <>
struct Multiply<float> {
  template <int N>
  static __device__ __forceinline__ void split(const unsigned (&x)[N], unsigned (&big)[N], unsigned (&small)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      big[i] = to_tf32(__uint_as_float(x[i]));
      small[i] = to_tf32(__uint_as_float(x[i]) - __uint_as_float(big[i]));
    }
  }
  static __device__ __forceinline__ void add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if NATRAIN_TF32_TERMS == 3
    unsigned a_big[4], a_small[4], b_big[2], b_small[2];
    split(a, a_big, a_small);
    split(b, b_big, b_small);
    // Tensor cores cut their sums off instead of rounding them, so that long ones stay outside.
    float part[4] = {};
    mma_m16n8k8_tf32(part, a_small, b_big);
    mma_m16n8k8_tf32(part, a_big, b_small);
    mma_m16n8k8_tf32(part, a_big, b_big);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i];
#else
    if constexpr (IS_ROUNDED) {
      mma_m16n8k8_tf32(d, a, b);
    } else {
      unsigned a_rounded[4] = {a[0], a[1], a[2], a[3]}, b_rounded[2] = {b[0], b[1]};
      round_to_tf32(a_rounded);
      round_to_tf32(b_rounded);
      mma_m16n8k8_tf32(d, a_rounded, b_rounded);
    }
#endif
  }
};

// A weight as a factor of Multiply<float>.
__device__ __forceinline__ unsigned factor(float weight) { return IS_ROUNDED ? to_tf32(weight) : __float_as_uint(weight); }

// Where lane `piece` of a fragment lies, from where piece 0 lies: permuted in the lower three bits, linear above.
template <int DIM>
__device__ __forceinline__ unsigned at_piece(unsigned offset, int piece) {
  return RowFormat<DIM>::SWIZZLED ? (offset ^ unsigned(piece % 8) * 16) + piece / 8 * 128 : offset + piece * 16;
}

// The A fragments of 16 rows of DIM elements; a step of the mma takes two 16-byte pieces of a row.
template <int DIM, bool MAY_BE_HELD = true>
class Rows {
  static constexpr int PIECES = RowFormat<DIM>::CHUNKS, STEPS = (PIECES + 1) / 2;
  // Beyond 48 registers they are read again from shared memory for every use.
  static constexpr bool HELD = MAY_BE_HELD && 4 * STEPS <= 48;
  unsigned held[HELD ? STEPS : 1][4];
  unsigned address;
  unsigned flip;

  __device__ __forceinline__ void read(int step, unsigned (&a)[4]) const {
    const unsigned from = at_piece<DIM>(address, 2 * step);
    if (2 * step + 1 < PIECES) {
      ldmatrix_x4(a, from);
    } else {
      unsigned half[2];
      ldmatrix_x2(half, from);
      a[0] = half[0], a[1] = half[1], a[2] = a[3] = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= flip;
  }

 public:
  // `offset`: of row 0. `flip_bits` of every word are flipped: a factor of -1 where they are the signs. All lanes of the
  // warp call; where rows are not held they are rounded in place.
  __device__ __forceinline__ void load(const Shared& shared, unsigned offset, unsigned flip_bits = 0) {
    const int lane = threadIdx.x % 32, row = lane % 16;
    load_columns(shared, offset, row, flip_bits);
    if constexpr (HELD && IS_ROUNDED) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) round_to_tf32(held[step]);
    } else if constexpr (IS_ROUNDED) {
#pragma unroll
      for (int i = lane; i < 16 * PIECES; i += 32) round_piece(shared.bytes + offset + RowFormat<DIM>::at(i / PIECES, i % PIECES));
      __syncwarp();
    }
  }

  // Rows that lie among the columns, and are rounded as they are: row lane % 16 is `column` of the line at `line_offset`.
  __device__ __forceinline__ void load_columns(const Shared& shared, unsigned line_offset, int column,
                                               unsigned flip_bits = 0) {
    address = shared.address + line_offset + RowFormat<DIM>::at(column, threadIdx.x % 32 / 16);
    flip = flip_bits;
    if constexpr (HELD) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) read(step, held[step]);
    }
  }

  // scores += rows . columns; `columns` from score_columns(), `bytes` from there to another group.
  __device__ __forceinline__ void multiply(float (&scores)[2][4], unsigned columns, unsigned bytes = 0) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned a[4], b[4];
      if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held[step][i];
      } else {
        read(step, a);
      }
      ldmatrix_x4(b, at_piece<DIM>(columns, 2 * step) + bytes);
      // Past an odd number of pieces: what follows the row may be another one's infinity.
      const bool whole = 2 * step + 1 < PIECES;
      const unsigned b0[2] = {b[0], whole ? b[1] : 0}, b1[2] = {b[2], whole ? b[3] : 0};
      Multiply<Element>::add(scores[0], a, b0);
      Multiply<Element>::add(scores[1], a, b1);
    }
  }
};

// Bytes from a group's first column to its second n8 block: in the same line, or in the next.
template <int DIM>
constexpr unsigned SECOND_BLOCK = (PAIRS_OF_LINES ? chunk(2) : 8) * RowFormat<DIM>::PITCH;

// Bytes from a step's first column to that of its group u.
template <int DIM>
__device__ constexpr unsigned group_bytes(int u) {
  const int per_line = step(2) / 16;
  const int line = PAIRS_OF_LINES ? 2 * u : u / per_line, x = PAIRS_OF_LINES ? 0 : u % per_line * 16;
  return ((line / step(1) * chunk(1) + line % step(1)) * chunk(2) + x) * RowFormat<DIM>::PITCH;
}

// This lane's address of the B fragments of scores in the group whose first column is `x` in the line at `line_offset`.
template <int DIM>
__device__ __forceinline__ unsigned score_columns(const Shared& shared, unsigned line_offset, int x) {
  const int matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
  return shared.address + line_offset + matrix / 2 * SECOND_BLOCK<DIM> + RowFormat<DIM>::at(x + row, matrix % 2);
}

// The columns as the right factor of weights: sums[n8 block of DIM] += weights . columns.
template <int DIM>
class SumColumns {
  static constexpr int BLOCKS = DIM / 8;
  using Format = RowFormat<DIM>;
  unsigned address;               // 16-bit: of ldmatrix
  const unsigned char* pointer;   // float32

 public:
  // As score_columns.
  __device__ __forceinline__ SumColumns(const Shared& shared, unsigned line_offset, int x) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    if constexpr (sizeof(Element) == 2) {
      address = shared.address + line_offset + matrix % 2 * SECOND_BLOCK<DIM> + Format::at(x + lane % 8, matrix / 2);
    } else {
      pointer = shared.bytes + line_offset + (x + 2 * (lane % 4)) * Format::PITCH;
    }
  }

  // `bytes`: from the first group to this one.
  __device__ __forceinline__ void add(float (&sums)[BLOCKS][4], const float (&weights)[2][4], unsigned bytes) const {
    if constexpr (sizeof(Element) == 2) {
      const unsigned a[4] = {pack<Element>(weights[0][0], weights[0][1]), pack<Element>(weights[0][2], weights[0][3]),
                             pack<Element>(weights[1][0], weights[1][1]), pack<Element>(weights[1][2], weights[1][3])};
#pragma unroll
      for (int block = 0; block + 1 < BLOCKS; block += 2) {
        unsigned b[4];
        ldmatrix_x4_trans(b, at_piece<DIM>(address, block) + bytes);
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        Multiply<Element>::add(sums[block], a, b0);
        Multiply<Element>::add(sums[block + 1], a, b1);
      }
      if constexpr (BLOCKS % 2 == 1) {
        unsigned b[2];
        ldmatrix_x2_trans(b, at_piece<DIM>(address, BLOCKS - 1) + bytes);
        Multiply<Element>::add(sums[BLOCKS - 1], a, b);
      }
    } else {
      // Any order of k will do if both factors have it: slot t is column 2t, slot t + 4 column 2t + 1, so that the
      // fragment of scores is one of weights without a shuffle.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned a[4] = {factor(weights[i][0]), factor(weights[i][2]), factor(weights[i][1]), factor(weights[i][3])};
        const unsigned char* even = pointer + bytes + i * SECOND_BLOCK<DIM>;
        // And any order of components: four blocks are the four words of a piece a lane, which put_rows() undoes.
#pragma unroll
        for (int block = 0; block + 4 <= BLOCKS; block += 4) {
          const unsigned char* piece = even + block * 32 + threadIdx.x % 32 / 4 * 16;
          const uint4 low = *reinterpret_cast<const uint4*>(piece), high = *reinterpret_cast<const uint4*>(piece + Format::PITCH);
          const unsigned b[4][2] = {{low.x, high.x}, {low.y, high.y}, {low.z, high.z}, {low.w, high.w}};
#pragma unroll
          for (int j = 0; j < 4; ++j) Multiply<Element>::add(sums[block + j], a, b[j]);
        }
#pragma unroll
        for (int block = BLOCKS / 4 * 4; block < BLOCKS; ++block) {
          const unsigned char* word = even + block * 32 + threadIdx.x % 32 / 4 * 4;
          const unsigned b[2] = {*reinterpret_cast<const unsigned*>(word),
                                 *reinterpret_cast<const unsigned*>(word + Format::PITCH)};
          Multiply<Element>::add(sums[block], a, b);
        }
      }
    }
  }
};

// Sums of weights of each row. 16-bit: of the weights as they are multiplied, rounded, by a product with ones, so that the
// rounding of a large weight cancels when the output is divided by the sum. float32: of this lane's columns.
template <class T>
class RowSums {
  float sums[4];

 public:
  __device__ __forceinline__ void reset() { sums[0] = sums[1] = sums[2] = sums[3] = 0; }
  __device__ __forceinline__ void add(const float (&weights)[2][4]) {
    const unsigned a[4] = {pack<T>(weights[0][0], weights[0][1]), pack<T>(weights[0][2], weights[0][3]),
                           pack<T>(weights[1][0], weights[1][1]), pack<T>(weights[1][2], weights[1][3])};
    const unsigned one = pack<T>(1, 1), ones[2] = {one, one};
    Multiply<T>::add(sums, a, ones);
  }
  __device__ __forceinline__ void scale(int half, float factor) { sums[2 * half] *= factor, sums[2 * half + 1] *= factor; }
  // Of row g + 8 * half, in all lanes that share it.
  __device__ __forceinline__ float of(int half) const { return sums[2 * half]; }
};
template <>
class RowSums<float> {
  float sums[2];

 public:
  __device__ __forceinline__ void reset() { sums[0] = sums[1] = 0; }
  __device__ __forceinline__ void add(const float (&weights)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i % 4 / 2] += weights[i / 4][i % 4];
  }
  __device__ __forceinline__ void scale(int half, float factor) { sums[half] *= factor; }
  __device__ __forceinline__ float of(int half) const {
    const float pair = sums[half] + __shfl_xor_sync(WARP, sums[half], 1);
    return pair + __shfl_xor_sync(WARP, pair, 2);
  }
};

// A tile of sums as 16 rows of DIM elements in shared memory at `offset`, times a factor for rows g and g + 8.
template <int DIM>
__device__ __forceinline__ void put_rows(const Shared& shared, unsigned offset, const float (&sums)[DIM / 8][4],
                                         const float (&factor)[2]) {
  using Format = RowFormat<DIM>;
  const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  constexpr int BLOCKS = DIM / 8, BY_FOUR = sizeof(Element) == 4 ? BLOCKS / 4 * 4 : 0;
#pragma unroll
  for (int block = 0; block < BY_FOUR; block += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float by = factor[i / 2];
      unsigned char* to = shared.bytes + offset + Format::at(row + i / 2 * 8, 2 * block + 2 * pair + i % 2);
      *reinterpret_cast<float4*>(to) = make_float4(sums[block][i] * by, sums[block + 1][i] * by, sums[block + 2][i] * by,
                                                   sums[block + 3][i] * by);
    }
  }
#pragma unroll
  for (int block = BY_FOUR; block < BLOCKS; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = sums[block][2 * half] * factor[half], high = sums[block][2 * half + 1] * factor[half];
      if constexpr (sizeof(Element) == 2) {
        unsigned char* to = shared.bytes + offset + Format::at(row + 8 * half, block) + pair * 4;
        *reinterpret_cast<unsigned*>(to) = pack<Element>(low, high);
      } else {
        unsigned char* to = shared.bytes + offset + Format::at(row + 8 * half, 2 * block) + pair * 8;
        *reinterpret_cast<float2*>(to) = make_float2(low, high);
      }
    }
  }
}

}  // namespace natrain
