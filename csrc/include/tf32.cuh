// float32 as a factor of TF32 products. Rounding takes two to three instructions a value (sm_90: NaN and infinity are told
// apart), so that values with several uses are rounded where they lie in shared memory.
#pragma once

#include "intrinsics.cuh"

namespace natrain {

// Words of float32 bits.
template <int N>
__device__ __forceinline__ void round_to_tf32(unsigned (&words)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) words[i] = to_tf32(__uint_as_float(words[i]));
}

// The 16-byte piece at `shared`, in place.
__device__ __forceinline__ void round_piece(unsigned char* shared) {
  uint4* const piece = reinterpret_cast<uint4*>(shared);
  unsigned words[4] = {piece->x, piece->y, piece->z, piece->w};
  round_to_tf32(words);
  *piece = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace natrain
