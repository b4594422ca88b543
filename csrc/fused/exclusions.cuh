// What takes a pair away at run time: a key that is masked (its score is -inf), a probability that dropout sets to zero.
// Rows are queries here.
#pragma once

#include "start.cuh"

namespace natrain {

// Both ask where a tile is, not only what is relative to its halo.
static_assert(!WALKS || !(NATRAIN_HAS_KEY_MASK || NATRAIN_HAS_DROPOUT));

class Exclusions {
  const Geometry& g;
  const Tile& tile;
  const LaneRows& rows;
  const unsigned char* mask_of_all;  // [B, Z, Y, X], not 0: may be attended
  const long long seed;
  const unsigned threshold;
  const unsigned char* mask;
  long long image;
  int at[3];

  // Position of the i-th value of group u, in positions of the halo.
  __device__ __forceinline__ int position(int axis, int u, int i) const {
    const int line = group_line(u, i / 4);
    return at[axis] + (axis == 0   ? line / step(1)
                       : axis == 1 ? line % step(1)
                                   : group_x(u, i / 4) + int(threadIdx.x % 4) * 2 + i % 2);
  }

 public:
  __device__ __forceinline__ Exclusions(const Geometry& geometry, const Tile& t, const LaneRows& lane_rows,
                                        const unsigned char* key_mask, const long long* seed_of_call, unsigned drop_threshold)
      : g(geometry),
        tile(t),
        rows(lane_rows),
        mask_of_all(key_mask),
        seed(NATRAIN_HAS_DROPOUT ? *seed_of_call : 0),
        threshold(drop_threshold) {}

  __device__ __forceinline__ void to_image(int index, long long tokens) {
    image = index;
    if (NATRAIN_HAS_KEY_MASK) mask = mask_of_all + index * tokens;
  }
  // The step whose first column is there in the halo.
  __device__ __forceinline__ void to_step(int z, int y, int x) { at[0] = z, at[1] = y, at[2] = x; }

  __device__ __forceinline__ void exclude(int u, float (&scores)[2][4]) const {
#if NATRAIN_HAS_KEY_MASK
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int token = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        // Past the end no score is left to exclude.
        const int column = min(tile.halo_first[axis] + position(axis, u, i / 2 * 4 + i % 2), tile.length[axis] - 1);
        token = token * g.length[axis] + tile.group[axis] + column * g.dilation[axis];
      }
      if (!__ldg(mask + token)) scores[i / 2][i % 2] = scores[i / 2][2 + i % 2] = MINUS_INFINITY;
    }
#endif
  }

  __device__ __forceinline__ void drop(int u, float (&weights)[2][4]) const {
#if NATRAIN_HAS_DROPOUT
    const long long tokens = (long long)g.length[0] * g.length[1] * g.length[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 4 / 2;
      const DropoutRow row(seed, (image * g.heads + tile.head) * tokens +
                                     tile.row_token(g, int(threadIdx.x % 32 / 4) + 8 * half));
      int slot = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis)
        slot = slot * kernel_size(axis) + position(axis, u, i) - rows.first[half][axis];
      if (!row.keeps(slot, threshold)) weights[i / 4][i % 4] = 0;
    }
#endif
  }
};

}  // namespace natrain
