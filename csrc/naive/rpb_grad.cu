// partial[chunk, head, entry] = sum of weights over a chunk of tokens by relative position: one thread an entry of the bias
// table gathers its weights, so that no atomics are needed and runs repeat bit by bit. Adjacent threads read adjacent
// slots. The batch has been summed up before.
#include "problem.cuh"

using namespace natrain;

struct Arguments {
  Geometry geometry;               // tiles, head_tile and batch are not used
  int row_chunk, column_chunk;     // token rows (z, y) and columns (x) that a block takes
  int row_chunks, column_chunks;
  const Element* weights;
  Acc* partial;
  Layout weights_at;
};

constexpr int ENTRIES_X = 2 * kernel_size(2) - 1, ENTRIES_Y = 2 * kernel_size(1) - 1, ENTRIES_Z = 2 * kernel_size(0) - 1;
constexpr int ENTRIES = ENTRIES_Z * ENTRIES_Y * ENTRIES_X;

// The slot in which the key `offset` positions after the query at `position` lies; negative if it is no neighbour.
__device__ __forceinline__ int slot_at(int axis, int position, int group_length, int offset) {
  const int k = kernel_size(axis), s = window_stride(axis), key = position + offset;
  const int start = window_start(position, group_length, k, s, is_causal(axis));
  return key < window_end(position, group_length, k, s, is_causal(axis)) ? key - start : -1;
}

extern "C" __global__ void __launch_bounds__(256) natrain_naive_rpb_grad(const __grid_constant__ Arguments args) {
  const Geometry& g = args.geometry;
  constexpr int ENTRY_BLOCKS_OF_32 = (ENTRIES + 31) / 32;
  const int entry_blocks = (ENTRY_BLOCKS_OF_32 * 32 + blockDim.x - 1) / blockDim.x;
  unsigned block = blockIdx.x;
  const int entry = block % entry_blocks * blockDim.x + threadIdx.x;
  block /= entry_blocks;
  const int head = block % g.heads;
  const unsigned chunk = block / g.heads;
  if (entry >= ENTRIES) return;

  const int offset[3] = {entry / (ENTRIES_X * ENTRIES_Y) - (kernel_size(0) - 1),
                         entry / ENTRIES_X % ENTRIES_Y - (kernel_size(1) - 1), entry % ENTRIES_X - (kernel_size(2) - 1)};
  const int column_first = chunk % args.column_chunks * args.column_chunk;
  const int row_first = chunk / args.column_chunks * args.row_chunk;
  const int column_end = min(column_first + args.column_chunk, g.length[2]);
  const int row_end = min(row_first + args.row_chunk, g.length[0] * g.length[1]);
  const Element* weights = args.weights + head * args.weights_at.head;

  const auto slot_of = [&](int axis, int token) {
    const int d = g.dilation[axis], group = token % d;
    return slot_at(axis, token / d, group_length(g.length[axis], d, group), offset[axis]);
  };

  Acc sum = 0;
  for (int row = row_first; row < row_end; ++row) {
    const int z = row / g.length[1], y = row % g.length[1];
    const int slot_z = slot_of(0, z), slot_y = slot_of(1, y);
    if (slot_z < 0 || slot_y < 0) continue;
    const Element* weights_row = weights + (z * args.weights_at.token[0] + y * args.weights_at.token[1] +
                                            (slot_z * kernel_size(1) + slot_y) * kernel_size(2));
#pragma unroll 4
    for (int x = column_first; x < column_end; ++x) {
      const int slot_x = slot_of(2, x);
      sum += slot_x < 0 ? Acc(0) : widen(weights_row[x * args.weights_at.token[2] + slot_x]);
    }
  }
  args.partial[(chunk * (long long)g.heads + head) * ENTRIES + entry] = sum;
}
